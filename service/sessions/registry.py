"""All sessions of the service: opens, parks, resumes and erases them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from models.manifest import Manifest, ModelKey
from service.engine.step_engine import StepEngine
from service.errors import (
    BundleMismatch,
    FieldInvalid,
    ModelNotStreamable,
    ResumePointLost,
    SessionExists,
    SessionMoved,
    SessionNotFound,
)
from service.sessions.checkpoints import Checkpointer, CheckpointMetrics
from service.sessions.erasure import Erasure
from service.sessions.evictions import EvictionMetrics, Evictions
from service.sessions.limits import SessionLimits, limit_reached
from service.sessions.record import HeldAnswer, SessionKey, SessionRecord, SessionState
from service.sessions.session import Owner, Session, StepMetrics, admits, hash_of
from service.sessions.stores.store import RecordUnreadable, SessionStore, StoreError
from service.sessions.table import SessionInfo, SessionTable, TableMetrics

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
        self._store_timeout_s = store_timeout_s
        self.checkpoints = Checkpointer(
            store,
            interval_s=checkpoint_interval_s,
            every_steps=checkpoint_steps,
            timeout_s=store_timeout_s,
            metrics=metrics,
            on_written=self._written,
        )
        self._erasure = Erasure(self.checkpoints, clock)
        self._table = SessionTable(self.checkpoints, self._erasure, metrics)
        self._evictions = Evictions(self._table, limits, metrics, self.leave)

    async def start(self) -> None:
        """Find what was parked, or live, when the service ended. Raises StoreError."""
        self._table.add_parked(await self._store.open())
        await self.enforce_limits()

    @property
    def durable(self) -> bool:
        """Whether sessions survive the end of the process, as things stand."""
        return self._store.durable and self.checkpoints.available

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

        Raises ModelNotStreamable, SessionExists, SessionMoved, SessionNotFound, Evicted, ResumePointLost,
        BundleMismatch, StoreUnavailable, SessionLimit, FieldInvalid; then nothing has changed.
        """
        self._check(opening, manifest)
        found = await self._found(opening)
        if found is not None:
            _check_fits(found, opening, manifest)
        was_live = found is not None and found.owner is not None
        if not was_live and opening.begin_with is None and self._table.live >= self._limits.max_streams:
            raise limit_reached("max_streams", self._limits.max_streams)
        session = found or self._new(opening, manifest)
        missed = session.take(owner, opening.answered_step, opening.caller_id)
        if not was_live:
            self._table.add_live(session.model, 1)
        if found is not None:
            self._metrics.session_resumed(session.model)
        else:
            self._begin(session)
        self.changed(session)
        return session, missed

    def changed(self, session: Session, steps: int = 0) -> None:
        """Steps or a reset were applied: write it behind."""
        if session.resumable and not session.ended:
            self.checkpoints.changed(session, steps)

    async def write_now(self, session: Session) -> None:
        """Write the session before the next round is due. Where the store is slow or down, go on without."""
        if self.durable and session.resumable:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._store_timeout_s):
                    await asyncio.shield(asyncio.ensure_future(self.checkpoints.write_changed()))

    def leave(self, session: Session, owner: Owner) -> None:
        """The stream is gone: park the session, or end it if it cannot be resumed."""
        if session.owner is not owner or session.ended:
            return
        session.owner = None
        self._table.add_live(session.model, -1)
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

    def find(self, key: SessionKey) -> SessionInfo:
        """What is known of a session. Raises SessionNotFound, Evicted."""
        return self._table.find(key)

    def after(self, key: SessionKey, sessions: int) -> list[SessionInfo]:
        """So many sessions of the key's tenant at most, by id, behind that key."""
        return [self.find(k) for k in self._table.keys.after(key, sessions)]

    async def record(self, key: SessionKey) -> SessionRecord:
        """A session as it is now, between two steps.

        Raises SessionNotFound, Evicted, ResumePointLost, StoreUnavailable.
        """
        parked = key not in self._table.in_memory and key in self._table.parked
        record = await self._read(key) if parked else None
        if session := self._table.in_memory.get(key):  # by now, perhaps
            return session.record()
        if record is None or key not in self._table.parked:
            raise self._table.departed.error(key)
        return record

    def served(self, state: SessionState | SessionRecord) -> Manifest:
        """Of the bundle that a state belongs to. Raises BundleMismatch."""
        served = self._manifests.get(state.model)
        if (
            served is None
            or served.weights_sha256 != state.weights_sha256
            or state.row.shape != self._engine.initial_row(state.model).shape
        ):
            raise BundleMismatch(
                f"the session's state belongs to other weights of model {state.model.name!r} than are served",
                model=state.model.name,
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
        elif key in self._table.parked:
            self._table.end_parked(key)
        elif not self._erasure.owes_scrub(key):
            raise self._table.departed.error(key)
        self._table.departed.remember(key)
        await self._erasure.scrub(key)

    async def run(self) -> None:
        """Keep the store up to date and the limits kept; until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.checkpoints.run())
            tasks.create_task(self._sweep())

    async def enforce_limits(self) -> None:
        """Evict what is idle, old or too much, tell the metrics what is left, and clean the store of the rest."""
        self._evictions.enforce(self._clock())
        self._table.count()
        await self._erasure.erase()
        await self._erasure.scrub_again()

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

    async def _found(self, opening: Opening) -> Session | None:
        """The session that the opening names; None if it may be a new one."""
        key, departed = opening.key, self._table.departed
        session = self._table.in_memory.get(key)
        if session is None and key in self._table.parked:
            session = await self._loaded(opening)
        if session is None:
            if opening.resume or (opening.rebuild and key in departed):
                error = departed.error(key)
                if isinstance(error, SessionNotFound):  # which a client that closes takes for erased
                    await self._erasure.confirm(key)
                raise error
            return None
        _check_token(session.token_hash, opening)
        return session

    async def _loaded(self, opening: Opening) -> Session | None:
        """From the store, unless somebody else has loaded or ended it meanwhile."""
        record = await self._read(opening.key)
        if loaded := self._table.in_memory.get(opening.key):
            return loaded
        if record is None or opening.key not in self._table.parked:
            return None
        _check_token(record.token_hash, opening)
        self.served(record)
        session = self._session(record)
        session.durable_step = record.next_step if self._store.durable else 0
        self._table.load(session)
        self.changed(session)  # if the stream does not take it after all, it goes back
        return session

    async def _read(self, key: SessionKey) -> SessionRecord | None:
        try:
            return await self.checkpoints.read(key)
        except RecordUnreadable as error:
            log.error("session %r cannot be read: %s", key.session_id, error)
            raise ResumePointLost(f"{error}; delete the session to use its id again", field="session_id") from None

    def _new(self, opening: Opening, manifest: Manifest) -> Session:
        self._evictions.make_room(opening.key.tenant)
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
                answered_step=state.next_step,
                row=state.row,
                opened_s=now_s,
                used_s=now_s,
            )
        )

    def _session(self, record: SessionRecord) -> Session:
        return Session(
            record, self._engine, self._metrics, max_held_bytes=self._limits.max_held_bytes, clock=self._clock
        )

    def _begin(self, session: Session) -> None:
        self._table.add(session)
        if session.resumable:
            self._erasure.replaced(session.key)
        self._metrics.session_opened(session.model)

    def _written(self, session: Session, record: SessionRecord) -> None:
        if self._store.durable:
            session.durable_step = record.next_step
        if session.owner is None:
            if not self.checkpoints.is_changed(session):
                self._table.unload(session, record)
        elif self._store.durable and session.next_step == record.next_step:
            session.owner.became_durable()


def _check_token(token_hash: bytes, opening: Opening) -> None:
    if opening.begin_with is not None or not admits(token_hash, opening.token):
        session_id = opening.key.session_id
        raise SessionExists(f"session {session_id!r} is in use", field="session_id", session_id=session_id)


def _check_fits(session: Session, opening: Opening, manifest: Manifest) -> None:
    """Whether the stream may have the session. Raises FieldInvalid, SessionMoved."""
    name, version = session.model
    if name != manifest.name:
        raise FieldInvalid(f"the session is one of model {name!r}", field="model")
    if opening.version not in (0, version):
        raise FieldInvalid(f"the session is one of version {version}", field="version")
    others = session.caller_id and opening.caller_id and session.caller_id != opening.caller_id
    if others and not opening.take_over:
        raise SessionMoved("another caller has this session now")
