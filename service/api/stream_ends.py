"""The end of a session's stream: counted, and one line of the log. It says nothing of what was sent."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple, Protocol

from models.manifest import ModelKey
from service.api.openings import OpenedSession
from service.errors import Evicted, ServingError

log = logging.getLogger(__name__)

CLOSED, CLIENT_GONE = "CLOSED", "CLIENT_GONE"
"""Ends that are the client's doing; all others are named by the reason that it is told."""


class StreamMetrics(Protocol):
    """Where ends are counted."""

    def stream_ended(self, model: ModelKey, reason: str) -> None:
        """A stream of a session of the model is over."""
        ...


class StreamEnd(NamedTuple):
    """Why, and what the session had of the stream's bytes."""

    reason: str
    request_id: str
    received_bytes: int
    sent_bytes: int
    limit: str = ""  # that the session met, if that is why


def limit_met(error: ServingError | None) -> str:
    """By a session that an error took away; empty if that is not why."""
    return error.metadata["limit"] if isinstance(error, Evicted) else ""


def report_end(metrics: StreamMetrics, opened: OpenedSession, end: StreamEnd) -> None:
    """To be called once for each session that a stream had."""
    session = opened.session
    metrics.stream_ended(session.model, end.reason)
    fields = {
        "session": session.key.session_id,
        "model": "{}/{}".format(*session.model),
        "reason": end.reason,
        **({"limit": end.limit} if end.limit else {}),
        "steps": session.next_step - opened.first_step,
        "duration_s": round(time.perf_counter() - opened.begun_s, 6),
        "received_bytes": end.received_bytes,
        "sent_bytes": end.sent_bytes,
        "request_id": end.request_id,
    }
    log.info("stream ended", extra=fields)
