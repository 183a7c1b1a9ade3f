"""All sessions of the service: opens, parks, resumes and erases them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from models.manifest import Manifest, ModelKey
from service.engine.step_engine import StepEngine
from service.errors import (
    BundleMismatch,
    FieldInvalid,
    ModelNotFound,
    ModelNotStreamable,
    ResumePointLost,
    SessionExists,
    SessionMoved,
    SessionNotFound,
    StoreUnavailable,
)
from service.sessions.checkpoints import Checkpointer, CheckpointMetrics
from service.sessions.erasure import Erasure
from service.sessions.evictions import EvictionMetrics, Evictions
from service.sessions.limits import SessionLimits, limit_reached
from service.sessions.record import HeldAnswer, SessionKey, SessionRecord, SessionState
from service.sessions.session import Owner, Session, StepMetrics, admits, hash_of
from service.sessions.shared import SharedSessions, Sharing
from service.sessions.shared_evictions import SharedEvictions
from service.sessions.stored import SessionsOfOneProcess, StoredSessions
from service.sessions.stores.shared import SharedStore, first_fence
from service.sessions.stores.store import RecordUnreadable, SessionStore, StoreError
from service.sessions.table import SessionInfo, SessionTable, TableMetrics
from service.sessions.together import Applied, StepsTogether

log = logging.getLogger(__name__)

SWEEP_S = 1.0


class SessionMetrics(StepMetrics, CheckpointMetrics, TableMetrics, EvictionMetrics, Protocol):
    """Where sessions and their steps are counted."""

    def session_opened(self, model: ModelKey) -> None:
        """A new session of the model began."""
        ...

    def session_resumed(self, model: ModelKey) -> None:
        """A session of the model was given to another stream."""
        ...


@dataclass(frozen=True)
class Opening:
    """What a stream asks for."""

    key: SessionKey
    token: bytes
    resume: bool = False
    rebuild: bool = False  # the client can send all steps again: what was lost begins anew, what was ended does not
    require_durable: bool = False
    answered_step: int = 0
    version: int = 0  # of the model; 0 = any
    caller_id: bytes = b""
    take_over: bool = False  # from another caller
    begin_with: SessionState | None = None  # a copy, and not the initial state; then there may be no such session yet


class SessionRegistry:
    """Opens, parks, resumes, evicts and erases sessions."""

    def __init__(
        self,
        engine: StepEngine,
        store: SessionStore | SharedStore,
        manifests: Mapping[ModelKey, Manifest],
        limits: SessionLimits,
        *,
        checkpoint_interval_s: float,
        checkpoint_steps: int,
        store_timeout_s: float,
        metrics: SessionMetrics,
        sharing: Sharing | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`sharing` says who we are in a store that other processes use, too, and is None where none does."""
        self._sharing = sharing
        self._engine = engine
        self._store = store
        self._manifests = dict(manifests)
        self._paddings = {model: manifest.padding for model, manifest in manifests.items()}  # as states, they stay
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._store_timeout_s = store_timeout_s
        self.live_elsewhere = 0  # streams of the same service in other processes
        self.checkpoints = Checkpointer(
            store,
            interval_s=checkpoint_interval_s,
            every_steps=checkpoint_steps,
            timeout_s=store_timeout_s,
            metrics=metrics,
            on_written=self._written,
            on_refused=self._refused,
        )
        self._erasure = Erasure(self.checkpoints, clock)
        self._table = SessionTable(self.checkpoints, self._erasure, metrics, knows_all=sharing is None)
        self._evictions = Evictions(self._table, limits, metrics, self.leave)
        self._stored = self._sessions_of(store, sharing)

    def _sessions_of(self, store: SessionStore | SharedStore, sharing: Sharing | None) -> StoredSessions:
        table, checkpoints = self._table, self.checkpoints
        if sharing is None:
            return SessionsOfOneProcess(cast("SessionStore", store), table, self._evictions, checkpoints)
        shared = cast("SharedStore", store)
        evictions = SharedEvictions(shared, table, self._erasure, checkpoints, self._limits, self._metrics)
        return SharedSessions(shared, sharing, table, self._erasure, evictions, checkpoints, self.leave)

    async def start(self) -> None:
        """Find what was parked, or live, when the service ended. Raises StoreError."""
        await self._stored.open()
        await self.enforce_limits()

    @property
    def durable(self) -> bool:
        """Whether sessions survive the end of the process, as things stand."""
        return self._store.durable and self.checkpoints.available

    @property
    def live(self) -> int:
        """How many sessions have a stream here."""
        return self._table.live

    @property
    def persistent(self) -> bool:
        """Whether sessions are kept where they survive the end of the process, at least while the store works."""
        return self._store.durable

    @property
    def resume_window_s(self) -> float:
        """How long a session is kept without a stream."""
        return self._limits.resume_window_s

    async def open(self, opening: Opening, manifest: Manifest, owner: Owner) -> tuple[Session, list[HeldAnswer]]:
        """The session for a stream, new or resumed, and the answers that it has missed.

        Raises ModelNotFound, ModelNotStreamable, SessionExists, SessionMoved, SessionNotFound, Evicted,
        ResumePointLost, BundleMismatch, StoreUnavailable, SessionLimit, FieldInvalid; then nothing has changed.
        """
        self._check(opening, manifest)
        await self.may_answer()  # or what is in memory may be another's by now
        session = await self._found(opening, manifest)
        is_new = session is None
        if session is None:
            await self._stored.make_room(opening.key.tenant)
            if manifest.key not in self._manifests:  # it was unloaded meanwhile
                raise _not_served(manifest.key)
            session = self._begun_meanwhile(opening, manifest) or self._new(opening, manifest)
            is_new = session.key not in self._table.in_memory
        else:
            self.served(session.record())  # its model may have been loaded anew since
        was_live = session.owner is not None
        live = self._table.live + self.live_elsewhere
        if not was_live and opening.begin_with is None and live >= self._limits.max_streams:
            raise limit_reached("max_streams", self._limits.max_streams)
        missed = session.take(owner, opening.answered_step, opening.caller_id)
        if not was_live:
            self._table.begin_stream(session)
        if is_new:
            self._begin(session)
        else:
            self._metrics.session_resumed(session.model)
        self.changed(session)
        try:
            await self._write_opened(session, opening, is_new=is_new)
        except BaseException as error:
            if is_new and not session.ended and isinstance(error, StoreUnavailable):
                self._table.end(session)
            self.leave(session, owner)
            raise
        return session, missed

    async def _write_opened(self, session: Session, opening: Opening, *, is_new: bool) -> None:
        """At once, where it matters who opened it. Raises StoreUnavailable if it must be durable and is not."""
        begun_among_others = is_new and self.shared  # no other process may begin one of the same id
        # A session that was taken over would go back to whoever had it before, after a crash.
        if opening.require_durable or opening.take_over or begun_among_others:
            await self.write_now(session)
        if opening.require_durable:
            self.checkpoints.require_available()

    def changed(self, session: Session, steps: int = 0) -> None:
        """Steps or a reset were applied: write it behind."""
        if session.resumable and not session.ended:
            self.checkpoints.changed(session, steps)

    def step_together(
        self,
        sessions: Sequence[Session],
        owners: Sequence[Owner],
        inputs: NDArray[np.generic],
        applied: Applied,
        dropped: Callable[[], None],
    ) -> StepsTogether:
        """Apply a step of each of several sessions of one model, of which none has another one under way.

        inputs (sessions, features) or (sessions,), validated and of the sessions' next steps. `dropped` is called
        where what becomes of them is lost.
        """
        job = StepsTogether(inputs, sessions, owners, applied, dropped, self._clock)
        self._engine.submit(sessions[0].model, job)
        return job

    def all_changed(self, sessions: Sequence[Session]) -> None:
        """A step of each of these was applied, all of one model: write them behind."""
        self._metrics.steps(sessions[0].model, len(sessions))
        self.checkpoints.all_changed((session for session in sessions if session.token_hash), len(sessions))

    async def may_answer(self) -> None:
        """Return once it is certain that the sessions here are ours."""
        await self._stored.may_answer()

    @property
    def shared(self) -> bool:
        """Whether other processes use the store, too."""
        return self._sharing is not None

    async def write_now(self, session: Session) -> None:
        """Write the session before the next round is due. Where the store is slow or down, go on without."""
        if self.durable and session.resumable:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._store_timeout_s):
                    await self.checkpoints.write_changed()

    def leave(self, session: Session, owner: Owner) -> None:
        """The stream is gone: park the session, or end it if it cannot be resumed."""
        if session.owner is not owner or session.ended:
            return
        self._table.end_stream(session)
        if session.resumable and self._limits.resume_window_s:
            session.used_s = self._clock()
            self.changed(session)
        else:
            self._table.end(session)

    async def close(self, session: Session, owner: Owner) -> bool:
        """End the session for good, or park it if answers are not acknowledged. Whether the store has erased it."""
        if session.owner is not owner or (session.resumable and not session.all_answered):
            self.leave(session, owner)
            return False
        self._table.end(session)
        self._table.departed.remember(session.key)
        await self._erasure.erase()
        return not self._erasure.owes(session.key)

    async def find(self, key: SessionKey) -> SessionInfo:
        """What is known of a session. Raises SessionNotFound, Evicted, StoreUnavailable."""
        if info := await self._stored.find(key):
            return info
        raise self._table.departed.error(key)

    async def after(self, key: SessionKey, sessions: int) -> list[SessionInfo]:
        """So many sessions of the key's tenant at most, by id, behind that key. Raises StoreUnavailable."""
        return await self._stored.after(key, sessions)

    async def record(self, key: SessionKey) -> SessionRecord:
        """A session as it is now, between two steps; of another process its last checkpoint.

        Raises SessionNotFound, Evicted, ResumePointLost, StoreUnavailable.
        """
        record = None
        if key not in self._table.in_memory:
            with _unreadable_is_lost(key):
                record = await self._stored.read(key)
        if session := self._table.in_memory.get(key):  # by now, perhaps
            return session.record()
        if record is None:
            raise self._table.departed.error(key)
        return record

    def serve(self, manifest: Manifest) -> None:
        """Its model has sessions from now on."""
        self._manifests[manifest.key] = manifest
        self._paddings[manifest.key] = manifest.padding

    def retire(self, model: ModelKey) -> None:
        """The model has no streams any more: those that there are end, and their sessions are parked."""
        del self._manifests[model]
        for session in list(self._table.in_memory.values()):
            if session.model == model and (owner := session.owner):
                self.leave(session, owner)
                owner.lose(_not_served(model))

    def live_of(self, model: ModelKey) -> int:
        """How many sessions of the model have a stream here."""
        return self._table.live_of(model)

    def served(self, state: SessionState | SessionRecord) -> Manifest:
        """Of the bundle that a state belongs to. Raises ModelNotFound, BundleMismatch."""
        served = self._manifests.get(state.model)
        if served is None:
            raise _not_served(state.model)
        row_size = self._engine.states(state.model).row_size
        fits = len(state.row) == row_size and state.pending <= served.look_ahead
        if served.weights_sha256 != state.weights_sha256 or not fits:
            name = state.model.name
            raise BundleMismatch(
                f"the session's state belongs to other weights of model {name!r} than are served", model=name
            )
        return served

    async def delete(self, key: SessionKey) -> None:
        """Erase a session everywhere, at once. Raises SessionNotFound, Evicted, StoreUnavailable.

        Where the store does not answer it is erased and scrubbed there later, or when it is deleted once more.
        """
        if session := self._table.in_memory.get(key):
            owner = session.owner
            self._table.end(session)
            if owner is not None:
                owner.lose(SessionNotFound("the session was deleted", field="session_id"))
        elif not await self._stored.end(key) and not self._erasure.owes_scrub(key):
            raise self._table.departed.error(key)
        self._table.departed.remember(key)
        await self._erasure.scrub(key)

    async def run(self) -> None:
        """Keep the store up to date and the limits kept; until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.checkpoints.run())
            tasks.create_task(self._sweep())
            tasks.create_task(self._stored.run())

    async def enforce_limits(self) -> None:
        """Evict what is idle, old or too much, tell the metrics what is left, and clean the store of the rest."""
        self._evictions.enforce_in_memory(self._clock())
        await self._stored.enforce_limits(self._clock())
        await self._erasure.erase()
        await self._erasure.scrub_again()

    async def bury(self, owners: Sequence[str]) -> None:
        """These processes are dead for certain, so that nobody need wait for the end of their leases."""
        await self._stored.bury(owners)

    async def park_all(self, timeout_s: float) -> None:
        """Write what has changed, before the process ends, as far as the time allows."""
        self._store.end_scrubs()
        try:
            async with asyncio.timeout(timeout_s):
                await self.checkpoints.write_changed()
                await self._erasure.erase()
        except TimeoutError:
            log.error("the session store does not keep up with the end of the service")
        if unwritten := len(self._table.unwritten()):
            log.error("%d sessions could not be written: they go on from their checkpoints before", unwritten)

    async def stop(self, timeout_s: float) -> None:
        """Leave the store, whatever it does."""
        try:
            await self._store.close(timeout_s)
        except StoreError as error:
            log.error("the session store did not end well: %s", error)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            await self.enforce_limits()

    def _check(self, opening: Opening, manifest: Manifest) -> None:
        """Whether there could be such a session. Raises ModelNotStreamable, FieldInvalid, StoreUnavailable."""
        if reason := manifest.network.why_not_streamable:
            raise ModelNotStreamable(
                f"model {manifest.name!r} cannot stream: {reason}; send whole sequences to SequenceService",
                model=manifest.name,
            )
        if (opening.resume or opening.require_durable) and not opening.token:
            raise FieldInvalid("only a session with a resume token can be resumed", field="resume_token")
        if opening.require_durable:
            self.checkpoints.require_available()

    async def _found(self, opening: Opening, manifest: Manifest) -> Session | None:
        """The session that the opening names, in memory by now; None if it may be a new one."""
        key, departed = opening.key, self._table.departed
        session = self._table.in_memory.get(key)
        if session is not None and session.owner is None and not await self._stored.keep(session):
            self._table.lose(session)
        if key not in self._table.in_memory:
            await self._load(opening, manifest)
        if session := self._begun_meanwhile(opening, manifest):
            return session
        if opening.resume or (opening.rebuild and key in departed):
            error = departed.error(key)
            if isinstance(error, SessionNotFound):  # which a client that closes takes for erased
                await self._erasure.confirm(key)
            raise error
        return None

    def _begun_meanwhile(self, opening: Opening, manifest: Manifest) -> Session | None:
        """The session in memory, if the stream may have it."""
        if session := self._table.in_memory.get(opening.key):
            _check_token(session.token_hash, opening)
            _check_fits(session.model, session.caller_id, opening, manifest)
        return session

    async def _load(self, opening: Opening, manifest: Manifest) -> None:
        """From the store into memory, if it is there and fits, and nobody else has loaded it meanwhile."""
        try:
            with _unreadable_is_lost(opening.key):
                check = partial(self._check_stored, opening, manifest)
                record = await self._stored.take(opening.key, check)
        except StoreUnavailable:
            if self._sharing is None or opening.resume or opening.require_durable:
                raise
            return  # it may be a new one; if it is not, the store will refuse it
        if record is None:
            return
        if session := self._table.in_memory.get(opening.key):  # loaded meanwhile
            if session.stored:
                session.fence = record.fence  # for it was taken once more, by us
            return
        session = self._session(record)
        session.stored = True
        session.durable_step = record.next_step if self._store.durable else 0
        self._table.load(session)
        self.changed(session)  # if the stream does not take it after all, it goes back

    def _check_stored(self, opening: Opening, manifest: Manifest, record: SessionRecord) -> None:
        _check_token(record.token_hash, opening)
        _check_fits(record.model, record.caller_id, opening, manifest)
        self.served(record)

    def _new(self, opening: Opening, manifest: Manifest) -> Session:
        now_s = self._clock()
        initial = SessionState(manifest.key, manifest.weights_sha256, 0, self._engine.initial_row(manifest.key))
        state = opening.begin_with or initial
        return self._session(
            SessionRecord(
                key=opening.key,
                model=state.model,
                weights_sha256=state.weights_sha256,
                token_hash=hash_of(opening.token) if self._limits.resume_window_s else b"",
                next_step=state.next_step,
                answered_step=state.next_answer,
                row=state.row,
                pending=state.pending,
                opened_s=now_s,
                used_s=now_s,
                fence=first_fence() if self._sharing else 0,
            )
        )

    def _session(self, record: SessionRecord) -> Session:
        return Session(
            record,
            self._engine,
            self._metrics,
            max_held_bytes=self._limits.max_held_bytes,
            clock=self._clock,
            padding=self._paddings[record.model],
            owner_name=self._sharing.owner if self._sharing else "",
        )

    def _begin(self, session: Session) -> None:
        self._table.add(session)
        if session.resumable:
            self._erasure.replaced(session.key)
        self._metrics.session_opened(session.model)

    def _written(self, session: Session, record: SessionRecord) -> None:
        session.stored = True
        if self._store.durable:
            session.durable_step = record.next_step
        if session.owner is None:
            if not self.checkpoints.is_changed(session):
                self._table.unload(session, record)
        elif self._store.durable and session.next_step == record.next_step:
            session.owner.became_durable()

    async def _refused(self, session: Session) -> None:
        """The store has it with another fence: another process has taken it, or we have, and did not hear so."""
        if session.stored and await self._stored.keep(session):
            self.changed(session)
        else:
            self._table.lose(session)


def _not_served(model: ModelKey) -> ModelNotFound:
    name, version = model
    return ModelNotFound(f"version {version} of model {name!r} is not served", field="model", model=name)


@contextmanager
def _unreadable_is_lost(key: SessionKey) -> Iterator[None]:
    try:
        yield
    except RecordUnreadable as error:
        log.error("session %r cannot be read: %s", key.session_id, error)
        raise ResumePointLost(f"{error}; delete the session to use its id again", field="session_id") from None


def _check_token(token_hash: bytes, opening: Opening) -> None:
    if opening.begin_with is not None or not admits(token_hash, opening.token):
        session_id = opening.key.session_id
        raise SessionExists(f"session {session_id!r} is in use", field="session_id", session_id=session_id)


def _check_fits(model: ModelKey, caller_id: bytes, opening: Opening, manifest: Manifest) -> None:
    """Whether the stream may have the session. Raises FieldInvalid, SessionMoved."""
    name, version = model
    if name != manifest.name:
        raise FieldInvalid(f"the session is one of model {name!r}", field="model")
    if opening.version not in (0, version):
        raise FieldInvalid(f"the session is one of version {version}", field="version")
    others = caller_id and opening.caller_id and caller_id != opening.caller_id
    if others and not opening.take_over:
        raise SessionMoved("another caller has this session now")
