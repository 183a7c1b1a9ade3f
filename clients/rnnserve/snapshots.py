"""Sessions as values."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from rnnserve.v1 import session_service_pb2


@dataclass(frozen=True)
class Snapshot:
    """A session of one moment between two steps, to go on with elsewhere. Save `data`; the rest is in it, too."""

    data: bytes = field(repr=False)
    """Signed by the server; what `import_session` takes."""
    model: str
    version: int
    weights_sha256: str
    """Of the model: only a server with these very weights imports it."""
    next_step: int
    """How many steps were applied."""
    created_at: datetime
    expires_at: datetime | None
    """When it can no longer be imported; None = never."""
    key_id: str
    """Which of the server's keys signed it."""


def snapshot_from(message: session_service_pb2.Snapshot) -> Snapshot:
    """A message of the wire -> what the caller gets."""
    return Snapshot(
        data=message.data,
        model=message.model,
        version=message.version,
        weights_sha256=message.weights_sha256,
        next_step=message.next_step,
        created_at=message.created_at.ToDatetime(UTC),
        expires_at=message.expires_at.ToDatetime(UTC) if message.HasField("expires_at") else None,
        key_id=message.key_id,
    )
