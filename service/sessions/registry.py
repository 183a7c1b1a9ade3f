"""All sessions of the service: live ones in memory, parked ones in the store, and the limits on both."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from models.manifest import Manifest, ModelKey
from service.engine.step_engine import StepEngine
from service.errors import (
    BundleMismatch,
    Evicted,
    FieldInvalid,
    ModelNotStreamable,
    ResumePointLost,
    ServingError,
    SessionExists,
    SessionLimit,
    SessionNotFound,
    StoreUnavailable,
)
from service.sessions.checkpoints import Checkpointer, CheckpointMetrics
from service.sessions.record import HeldAnswer, SessionKey, SessionRecord, SessionSummary, summary_of
from service.sessions.session import Owner, Session, StepMetrics, admits, hash_of
from service.sessions.stores.store import RecordUnreadable, SessionStore

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0
SWEEP_S = 1.0
REMEMBERED_EVICTIONS = 100_000


class SessionMetrics(StepMetrics, CheckpointMetrics, Protocol):
    """Where sessions and their steps are counted."""

    def session_opened(self, model: ModelKey) -> None:
        """A new session of the model began."""
        ...

    def session_resumed(self, model: ModelKey) -> None:
        """A session of the model was given to another stream."""
        ...

    def live_sessions(self, model: ModelKey, sessions: int) -> None:
        """So many sessions of the model have a stream."""
        ...

    def parked(self, sessions: int, size_bytes: int) -> None:
        """So many sessions have no stream, and their states and answers so many bytes."""
        ...

    def evicted(self, limit: str) -> None:
        """A session met a limit."""
        ...


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


@dataclass(frozen=True)
class Opening:
    """What a stream asks for."""

    key: SessionKey
    token: bytes
    resume: bool = False
    require_durable: bool = False
    answered_step: int = 0


@dataclass(frozen=True)
class SessionInfo:
    """A session as it is now, and whether it has a stream."""

    summary: SessionSummary
    live: bool


class SessionRegistry:
    """Opens, parks, resumes, evicts and erases sessions."""

    def __init__(
        self,
        engine: StepEngine,
        store: SessionStore,
        manifests: Mapping[ModelKey, Manifest],
        limits: SessionLimits,
        *,
        checkpoint_interval_s: float,
        checkpoint_steps: int,
        store_timeout_s: float,
        metrics: SessionMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._store = store
        self._manifests = manifests
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._sessions: dict[SessionKey, Session] = {}  # live, or parked and not yet written
        self._stored: OrderedDict[SessionKey, SessionSummary] = OrderedDict()  # parked, the longest unused first
        self._stored_bytes = 0
        self._per_tenant: Counter[str] = Counter()
        self._live: Counter[ModelKey] = Counter()
        self._evicted: OrderedDict[SessionKey, str] = OrderedDict()  # and the limit that each met
        self._to_erase: set[SessionKey] = set()
        self.checkpoints = Checkpointer(
            store,
            interval_s=checkpoint_interval_s,
            every_steps=checkpoint_steps,
            timeout_s=store_timeout_s,
            metrics=metrics,
            on_written=self._written,
        )

    async def start(self) -> None:
        """Find what was parked, or live, when the service ended. Raises StoreError."""
        for summary in await self._store.open():
            self._add_stored(summary)
            self._per_tenant[summary.key.tenant] += 1
        await self.enforce_limits()

    @property
    def durable(self) -> bool:
        """Whether sessions survive the end of the process, as things stand."""
        return self._store.durable and self.checkpoints.available

    @property
    def resume_window_s(self) -> float:
        """How long a session is kept without a stream."""
        return self._limits.resume_window_s

    async def open(self, opening: Opening, manifest: Manifest, owner: Owner) -> tuple[Session, list[HeldAnswer]]:
        """The session for a stream, new or resumed, and the answers that it has missed.

        Raises ModelNotStreamable, SessionExists, SessionNotFound, Evicted, ResumePointLost, BundleMismatch,
        StoreUnavailable, SessionLimit, FieldInvalid; then nothing has changed.
        """
        if reason := manifest.network.why_not_streamable:
            raise ModelNotStreamable(
                f"model {manifest.name!r} cannot stream: {reason}; send whole sequences to SequenceService",
                model=manifest.name,
            )
        if (opening.resume or opening.require_durable) and not opening.token:
            raise FieldInvalid("only a session with a resume token can be resumed", field="resume_token")
        if opening.require_durable:
            self.checkpoints.require_available()
        found = await self._found(opening)
        if found is not None and found.model.name != manifest.name:
            raise FieldInvalid(f"the session is one of model {found.model.name!r}", field="model")
        was_live = found is not None and found.owner is not None
        if not was_live:
            self._check_streams()
        session = found or self._new(opening, manifest)
        missed = session.take(owner, opening.answered_step)
        self._sessions[session.key] = session
        if not was_live:
            self._add_live(session.model, 1)
        if found is not None:
            self._metrics.session_resumed(session.model)
        else:
            self._per_tenant[session.key.tenant] += 1
            self._evicted.pop(session.key, None)
            self._metrics.session_opened(session.model)
        self.changed(session)
        return session, missed

    def changed(self, session: Session, steps: int = 0) -> None:
        """Steps or a reset were applied: write it behind."""
        if session.resumable and not session.ended:
            self.checkpoints.changed(session, steps)

    def leave(self, session: Session, owner: Owner) -> None:
        """The stream is gone: park the session, or end it if it cannot be resumed."""
        if session.owner is not owner or session.ended:
            return
        session.owner = None
        self._add_live(session.model, -1)
        if session.resumable and self._limits.resume_window_s:
            session.used_s = self._clock()
            self.changed(session)
        else:
            self._end(session)

    async def close(self, session: Session, owner: Owner) -> None:
        """End the session for good, or park it if answers are not acknowledged."""
        if session.owner is not owner or (session.resumable and not session.all_answered):
            self.leave(session, owner)
            return
        self._end(session)
        await self._erase_ended()

    def find(self, key: SessionKey) -> SessionInfo:
        """What is known of a session. Raises SessionNotFound, Evicted."""
        if session := self._sessions.get(key):
            return SessionInfo(summary_of(session.record()), live=session.owner is not None)
        if summary := self._stored.get(key):
            return SessionInfo(summary, live=False)
        raise self._gone(key)

    def after(self, key: SessionKey, sessions: int) -> list[SessionInfo]:
        """So many sessions of the key's tenant at most, by id, behind that key."""
        keys = (k for k in chain(self._sessions, self._stored) if k > key and k.tenant == key.tenant)
        return [self.find(k) for k in heapq.nsmallest(sessions, keys)]

    async def delete(self, key: SessionKey) -> None:
        """Erase a session everywhere, at once. Raises SessionNotFound, Evicted, StoreUnavailable.

        Where the store does not answer it is erased there as soon as it does.
        """
        if session := self._sessions.get(key):
            owner = session.owner
            self._end(session)
            if owner is not None:
                owner.lose(SessionNotFound("the session was deleted", field="session_id"))
        elif key in self._stored:
            self._end_stored(key)
        else:
            raise self._gone(key)
        await self.checkpoints.scrub([key])
        self._to_erase.discard(key)

    async def run(self) -> None:
        """Keep the store up to date and the limits kept; until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.checkpoints.run())
            tasks.create_task(self._sweep())

    async def enforce_limits(self) -> None:
        """Evict what is idle, old or too much, and tell the metrics what is left."""
        now_s = self._clock()
        self._evict_unstored(now_s)
        self._evict_stored_ones(now_s)
        self._evict_surplus()
        self._count()
        await self._erase_ended()

    async def park_all(self) -> None:
        """Write what has changed, before the process ends."""
        await self.checkpoints.write_changed()
        await self._erase_ended()

    async def stop(self) -> None:
        """Leave the store."""
        await self._store.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            await self.enforce_limits()

    async def _found(self, opening: Opening) -> Session | None:
        """The session that the opening names; None if it may be a new one."""
        key = opening.key
        session = self._sessions.get(key)
        if session is None and key in self._stored:
            session = await self._loaded(opening)
        if session is None:
            if opening.resume:
                raise self._gone(key)
            return None
        _check_token(session.token_hash, opening)
        return session

    async def _loaded(self, opening: Opening) -> Session | None:
        """From the store, unless somebody else has loaded or ended it meanwhile."""
        try:
            record = await self.checkpoints.read(opening.key)
        except RecordUnreadable as error:
            log.error("session %r cannot be resumed: %s", opening.key.session_id, error)
            raise ResumePointLost(f"{error}; delete the session to use its id again", field="session_id") from None
        if opening.key in self._sessions:
            return self._sessions[opening.key]
        if record is None or opening.key not in self._stored:
            return None
        _check_token(record.token_hash, opening)
        served = self._manifests.get(record.model)
        if served is None or served.weights_sha256 != record.weights_sha256:
            raise BundleMismatch(
                f"the session's state belongs to other weights of model {record.model.name!r} than are served",
                model=record.model.name,
            )
        session = self._session(record)
        session.durable_step = record.next_step if self._store.durable else 0
        self._remove_stored(opening.key)
        self._sessions[opening.key] = session
        self.changed(session)  # if the stream does not take it after all, it goes back
        return session

    def _new(self, opening: Opening, manifest: Manifest) -> Session:
        self._make_room(opening.key.tenant)
        now_s = self._clock()
        self._to_erase.discard(opening.key)
        return self._session(
            SessionRecord(
                key=opening.key,
                model=manifest.key,
                weights_sha256=manifest.weights_sha256,
                token_hash=hash_of(opening.token) if self._limits.resume_window_s else b"",
                next_step=0,
                answered_step=0,
                row=self._engine.initial_row(manifest.key),
                opened_s=now_s,
                used_s=now_s,
            )
        )

    def _session(self, record: SessionRecord) -> Session:
        return Session(
            record, self._engine, self._metrics, max_held_bytes=self._limits.max_held_bytes, clock=self._clock
        )

    def _check_streams(self) -> None:
        if self._live.total() >= self._limits.max_streams:
            raise _limit_reached("max_streams", self._limits.max_streams)

    def _make_room(self, tenant: str) -> None:
        """Evict the longest parked session where one more would be too many. Raises SessionLimit if none is parked."""
        limits = self._limits
        if len(self._sessions) + len(self._stored) >= limits.max_sessions and not self._evict_longest_parked(
            "max_sessions"
        ):
            raise _limit_reached("max_sessions", limits.max_sessions)
        if self._per_tenant[tenant] >= limits.max_sessions_per_tenant > 0 and not self._evict_longest_parked(
            "max_sessions_per_tenant", tenant
        ):
            raise _limit_reached("max_sessions_per_tenant", limits.max_sessions_per_tenant)

    def _evict_longest_parked(self, limit: str, tenant: str | None = None) -> bool:
        """Whether there was one, of the tenant if it matters; those in the store are parked the longest."""
        key = next((key for key in self._stored if tenant in (None, key.tenant)), None)
        if key is not None:
            self._evict_stored(key, limit)
            return True
        session = next((s for s in self._unwritten() if tenant in (None, s.key.tenant)), None)
        if session is not None:
            self._evict(session, limit)
        return session is not None

    def _evict_unstored(self, now_s: float) -> None:
        """A session that is too old ends; a stream that is idle loses its session, which is parked."""
        limits = self._limits
        for session in list(self._sessions.values()):
            owner = session.owner
            if limits.max_age_s and now_s - session.opened_s > limits.max_age_s:
                self._evict(session, "max_session_age_s")
                if owner is not None:
                    owner.lose(_evicted("max_session_age_s", resumable=False))
            elif owner is None and now_s - session.used_s > limits.resume_window_s:
                self._evict(session, "resume_window_s")
            elif owner is not None and limits.idle_timeout_s and now_s - session.used_s > limits.idle_timeout_s:
                self.leave(session, owner)
                self._metrics.evicted("idle_timeout_s")
                owner.lose(_evicted("idle_timeout_s", resumable=session.resumable))

    def _evict_stored_ones(self, now_s: float) -> None:
        limits = self._limits
        while self._stored:
            key, summary = next(iter(self._stored.items()))
            if now_s - summary.used_s <= limits.resume_window_s:
                break
            self._evict_stored(key, "resume_window_s")
        if limits.max_age_s:
            too_old = [key for key, s in self._stored.items() if now_s - s.opened_s > limits.max_age_s]
            for key in too_old:
                self._evict_stored(key, "max_session_age_s")

    def _evict_surplus(self) -> None:
        most_bytes, unwritten_bytes = self._limits.max_parked_bytes, self._unwritten_bytes()
        while self._stored and self._stored_bytes + unwritten_bytes > most_bytes > 0:
            self._evict_longest_parked("max_parked_bytes")
        while not self._stored and self._unwritten_bytes() > most_bytes > 0:
            self._evict_longest_parked("max_parked_bytes")

    def _evict(self, session: Session, limit: str) -> None:
        self._end(session)
        self._remember_eviction(session.key, limit)

    def _evict_stored(self, key: SessionKey, limit: str) -> None:
        self._end_stored(key)
        self._remember_eviction(key, limit)

    def _end_stored(self, key: SessionKey) -> None:
        self._remove_stored(key)
        self._per_tenant[key.tenant] -= 1
        self._to_erase.add(key)

    def _remember_eviction(self, key: SessionKey, limit: str) -> None:
        self._evicted[key] = limit
        if len(self._evicted) > REMEMBERED_EVICTIONS:
            self._evicted.popitem(last=False)
        self._metrics.evicted(limit)

    def _end(self, session: Session) -> None:
        session.ended = True
        if session.owner is not None:
            session.owner = None
            self._add_live(session.model, -1)
        del self._sessions[session.key]
        self.checkpoints.forget(session)
        self._per_tenant[session.key.tenant] -= 1
        if session.resumable:
            self._to_erase.add(session.key)

    def _written(self, session: Session, record: SessionRecord) -> None:
        if self._store.durable:
            session.durable_step = record.next_step
        if session.owner is None:
            if not self.checkpoints.is_changed(session):
                del self._sessions[session.key]
                self._add_stored(summary_of(record))
        elif self._store.durable and session.next_step == record.next_step:
            session.owner.became_durable()

    def _add_stored(self, summary: SessionSummary) -> None:
        self._stored[summary.key] = summary
        self._stored_bytes += summary.size_bytes

    def _remove_stored(self, key: SessionKey) -> None:
        self._stored_bytes -= self._stored.pop(key).size_bytes

    async def _erase_ended(self) -> None:
        """What is over is forgotten by the store, too; where it does not answer, later."""
        keys = list(self._to_erase)
        if keys:
            self._to_erase.clear()
            try:
                await self.checkpoints.erase(keys)
            except StoreUnavailable:
                self._to_erase.update(key for key in keys if key not in self._sessions)

    def _gone(self, key: SessionKey) -> ServingError:
        if limit := self._evicted.get(key):
            return _evicted(limit, resumable=False)
        return SessionNotFound(f"there is no session {key.session_id!r}", field="session_id")

    def _add_live(self, model: ModelKey, sessions: int) -> None:
        self._live[model] += sessions
        self._metrics.live_sessions(model, self._live[model])

    def _count(self) -> None:
        sessions, size_bytes = len(self._unwritten()), self._unwritten_bytes()
        self._metrics.parked(len(self._stored) + sessions, self._stored_bytes + size_bytes)

    def _unwritten_bytes(self) -> int:
        return sum(session.record().size_bytes for session in self._unwritten())

    def _unwritten(self) -> list[Session]:
        """Parked, but not in the store yet, the longest unused first: more than a few where it is slow or down."""
        parked = [session for session in self._sessions.values() if session.owner is None]
        return sorted(parked, key=lambda session: session.used_s)


def _check_token(token_hash: bytes, opening: Opening) -> None:
    if not admits(token_hash, opening.token):
        session_id = opening.key.session_id
        raise SessionExists(f"session {session_id!r} is in use", field="session_id", session_id=session_id)


def _limit_reached(name: str, limit: int) -> SessionLimit:
    return SessionLimit(f"there are {limit} already ({name})", retry_after_s=RETRY_AFTER_S, limit=limit)


def _evicted(limit: str, *, resumable: bool) -> Evicted:
    rest = "it is parked and can be resumed" if resumable else "it is gone"
    return Evicted(f"the session met the limit {limit}; {rest}", limit=limit, resumable=str(resumable).lower())
