"""The end of a session's stream: counted, and one line of the log. It says nothing of what was sent."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from models.manifest import ModelKey
from service.api.openings import OpenedSession

log = logging.getLogger(__name__)

CLOSED, CLIENT_GONE = "CLOSED", "CLIENT_GONE"
"""Ends that are the client's doing; all others are named by the reason that it is told."""


class StreamMetrics(Protocol):
    """Where ends are counted."""

    def stream_ended(self, model: ModelKey, reason: str) -> None:
        """A stream of a session of the model is over."""
        ...


def report_end(metrics: StreamMetrics, opened: OpenedSession, reason: str, request_id: str, **details: int) -> None:
    """To be called once for each session that a stream had."""
    session = opened.session
    metrics.stream_ended(session.model, reason)
    fields = {
        "session": session.key.session_id,
        "model": "{}/{}".format(*session.model),
        "reason": reason,
        "steps": session.next_step - opened.first_step,
        "duration_s": round(time.perf_counter() - opened.begun_s, 6),
        **details,
        "request_id": request_id,
    }
    log.info("stream ended", extra=fields)
