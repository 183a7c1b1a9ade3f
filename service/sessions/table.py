"""Which sessions there are: those in memory, and those that only the store has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.manifest import ModelKey
from service.errors import SessionMoved
from service.sessions.checkpoints import Checkpointer
from service.sessions.erasure import Erasure
from service.sessions.index import Departed, Parked, SessionKeys
from service.sessions.record import SessionKey, SessionRecord, SessionSummary, summary_of
from service.sessions.session import Session


class TableMetrics(Protocol):
    """Where the sessions that are there are counted."""

    def live_sessions(self, model: ModelKey, sessions: int) -> None:
        """So many sessions of the model have a stream."""
        ...

    def parked(self, sessions: Mapping[ModelKey, int], size_bytes: int) -> None:
        """So many sessions of each model have no stream, and their states and answers so many bytes in all."""
        ...


@dataclass(frozen=True)
class SessionInfo:
    """A session as it is now, and whether it has a stream."""

    summary: SessionSummary
    live: bool


class SessionTable:
    """Finds, counts and ends sessions."""

    def __init__(
        self, checkpoints: Checkpointer, erasure: Erasure, metrics: TableMetrics, *, knows_all: bool = True
    ) -> None:
        """Where other processes use the store it does not know what is parked there."""
        self._knows_all = knows_all
        self.in_memory: dict[SessionKey, Session] = {}  # live, or parked and not yet written
        self._unwritten: dict[Session, None] = {}  # of these the ones without a stream
        self.parked = Parked()
        self.keys = SessionKeys()
        self.departed = Departed()
        self._live: Counter[ModelKey] = Counter()
        self._checkpoints = checkpoints
        self._erasure = erasure
        self._metrics = metrics

    @property
    def live(self) -> int:
        """How many have a stream."""
        return self._live.total()

    def live_of(self, model: ModelKey) -> int:
        """How many of the model have a stream."""
        return self._live[model]

    def add_parked(self, summaries: Sequence[SessionSummary]) -> None:
        """What the store has from before, the longest unused first."""
        for summary in summaries:
            self.parked.add(summary)
        self.keys.update(summary.key for summary in summaries)

    def add(self, session: Session) -> None:
        """A new one."""
        self.in_memory[session.key] = session
        self.keys.update([session.key])
        self.departed.forget(session.key)

    def load(self, session: Session) -> None:
        """It was read from the store."""
        if self._knows_all:
            self.parked.remove(session.key)
        else:
            self.keys.update([session.key])
        self.in_memory[session.key] = session
        self._unwritten[session] = None

    def unload(self, session: Session, record: SessionRecord) -> None:
        """It is in the store as it is now, and has no stream."""
        del self.in_memory[session.key], self._unwritten[session]
        if self._knows_all:
            self.parked.add(summary_of(record))
        else:
            self.keys.remove(session.key)

    def begin_stream(self, session: Session) -> None:
        """It has a stream, and had none."""
        self._unwritten.pop(session, None)
        self._add_live(session.model, 1)

    def end_stream(self, session: Session) -> None:
        """It has none any more."""
        session.owner = None
        self._unwritten[session] = None
        self.parked.per_model[session.model] += 0  # to be told of from now on, also when there is none any more
        self._add_live(session.model, -1)

    def _add_live(self, model: ModelKey, sessions: int) -> None:
        self._live[model] += sessions
        self._metrics.live_sessions(model, self._live[model])

    def end(self, session: Session) -> None:
        """It is over, at once in memory and soon in the store."""
        self._forget(session)
        if session.resumable:
            self._erasure.add(session.key, session.fence)

    def lose(self, session: Session) -> None:
        """Another process has it; its stream here ends. Nothing happens to one that has left the memory already."""
        if self.in_memory.get(session.key) is not session:
            return
        owner = session.owner
        self._forget(session)
        if owner is not None:
            owner.lose(SessionMoved("another server has this session now"))

    def _forget(self, session: Session) -> None:
        session.ended = True
        if session.owner is not None:
            self.end_stream(session)
        self._unwritten.pop(session, None)
        del self.in_memory[session.key]
        self.keys.remove(session.key)
        self._checkpoints.forget(session)

    def end_parked(self, key: SessionKey) -> None:
        """The same of one that only the store has."""
        self.parked.remove(key)
        self.keys.remove(key)
        self._erasure.add(key, 0)

    def find(self, key: SessionKey) -> SessionInfo | None:
        """What is known of a session."""
        if session := self.in_memory.get(key):
            return SessionInfo(summary_of(session.record()), live=session.owner is not None)
        if summary := self.parked.get(key):
            return SessionInfo(summary, live=False)
        return None

    def unwritten(self) -> list[Session]:
        """Parked, but not in the store yet, the longest unused first: more than a few where it is slow or down."""
        return sorted(self._unwritten, key=lambda session: session.used_s)

    def unwritten_bytes(self) -> int:
        """Of their states and answers."""
        return _size_bytes(self.unwritten())

    def count(self) -> None:
        """Tell the metrics what is parked."""
        unwritten = self.unwritten()
        sessions = self.parked.per_model.copy()
        sessions.update(session.model for session in unwritten)
        self._metrics.parked(sessions, self.parked.size_bytes + _size_bytes(unwritten))


def _size_bytes(sessions: Sequence[Session]) -> int:
    return sum(session.size_bytes for session in sessions)
