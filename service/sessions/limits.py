"""The limits on sessions, and what is said of a session that met one."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import Evicted, SessionLimit

RETRY_AFTER_S = 5.0
EVICTING = (
    "max_sessions",
    "max_sessions_per_tenant",
    "max_parked_bytes",
    "resume_window_s",
    "idle_timeout_s",
    "max_session_age_s",
)
"""The limits that take a session away from its client."""


@dataclass(frozen=True)
class SessionLimits:
    """Units are in the names; 0 = none, but for `resume_window_s`, where 0 = sessions end with their streams."""

    max_streams: int
    max_sessions: int
    max_sessions_per_tenant: int
    max_parked_bytes: int
    max_held_bytes: int
    resume_window_s: float
    idle_timeout_s: float
    max_age_s: float


def limit_reached(name: str, limit: int) -> SessionLimit:
    """What one more is told."""
    return SessionLimit(f"there are {limit} already ({name})", retry_after_s=RETRY_AFTER_S, limit=limit)


def evicted(limit: str, *, resumable: bool) -> Evicted:
    """What the client of a session is told that met the limit."""
    rest = "it is parked and can be resumed" if resumable else "it is gone"
    return Evicted(f"the session met the limit {limit}; {rest}", limit=limit, resumable=str(resumable).lower())
