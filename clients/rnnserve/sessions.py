"""What a server says about its sessions."""

from dataclasses import dataclass
from datetime import UTC, datetime

from rnnserve.v1 import session_service_pb2


@dataclass(frozen=True)
class SessionInfo:
    """One session of the server, whoever opened it."""

    id: str
    model: str
    version: int
    live: bool
    """Whether it has a stream; else it is parked and waits to be resumed."""
    next_step: int
    """How many steps were applied."""
    opened_at: datetime
    used_at: datetime
    """Its last message, or the end of its stream."""
    size_bytes: int
    """Its state and the answers that are not acknowledged."""


def session_from(message: session_service_pb2.Session) -> SessionInfo:
    """A message of the wire -> what the caller gets."""
    return SessionInfo(
        id=message.session_id,
        model=message.model,
        version=message.version,
        live=message.state == session_service_pb2.SESSION_STATE_LIVE,
        next_step=message.next_step,
        opened_at=message.opened_at.ToDatetime(UTC),
        used_at=message.used_at.ToDatetime(UTC),
        size_bytes=message.size_bytes,
    )
