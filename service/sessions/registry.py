"""The open sessions of the service."""

from __future__ import annotations

from typing import Protocol

from models.manifest import Manifest, ModelKey
from service.engine.step_engine import StepEngine
from service.errors import ModelNotStreamable, SessionExists, SessionLimit
from service.sessions.session import Session, StepMetrics

RETRY_AFTER_S = 5.0


class SessionMetrics(StepMetrics, Protocol):
    """Where sessions and their steps are counted."""

    def session_opened(self, model: ModelKey) -> None:
        """A session of the model began."""
        ...

    def session_closed(self, model: ModelKey) -> None:
        """A session of the model ended."""
        ...


class SessionRegistry:
    """Opens and closes sessions; an id is used once at a time."""

    def __init__(self, engine: StepEngine, *, max_sessions: int, metrics: SessionMetrics) -> None:
        self._engine = engine
        self._max_sessions = max_sessions
        self._metrics = metrics
        self._sessions: dict[str, Session] = {}

    def open(self, session_id: str, manifest: Manifest) -> Session:
        """A new session in its initial state. Raises ModelNotStreamable, SessionExists, SessionLimit."""
        if reason := manifest.network.why_not_streamable:
            raise ModelNotStreamable(
                f"model {manifest.name!r} cannot stream: {reason}; send whole sequences to SequenceService",
                model=manifest.name,
            )
        if session_id in self._sessions:
            raise SessionExists(f"session {session_id!r} is in use", field="session_id", session_id=session_id)
        if len(self._sessions) >= self._max_sessions:
            raise SessionLimit(
                f"all {self._max_sessions} sessions are in use", retry_after_s=RETRY_AFTER_S, limit=self._max_sessions
            )
        session = self._sessions[session_id] = Session(session_id, manifest.key, self._engine, self._metrics)
        self._metrics.session_opened(session.model)
        return session

    def close(self, session: Session) -> None:
        """Forget an open session."""
        del self._sessions[session.session_id]
        self._metrics.session_closed(session.model)
