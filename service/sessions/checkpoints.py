"""Writes sessions behind, in rounds, off the path of their steps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from service.errors import StoreUnavailable
from service.sessions.record import SessionKey, SessionRecord
from service.sessions.rounds import SharedRounds, retrieve
from service.sessions.session import Session
from service.sessions.stores.store import RecordStore, RecordUnreadable, StoreError

log = logging.getLogger(__name__)

BATCH_SESSIONS = 500  # written at a time; the event loop copies so many in a few milliseconds
RETRY_AFTER_S = 2.0
Result = TypeVar("Result")


class CheckpointMetrics(Protocol):
    """Where checkpoints are counted."""

    def checkpoint(self, sessions: int, duration_s: float) -> None:
        """So many sessions were written."""
        ...

    def store_available(self, available: bool) -> None:
        """Whether the store can be written."""
        ...

    def store_asked(self, operation: str, duration_s: float) -> None:
        """The store has done the operation."""
        ...

    def store_failed(self, operation: str) -> None:
        """The store has not done the operation, or not in time."""
        ...


class Checkpointer:
    """Keeps a store as up to date as its pace allows. A store that is slow or down never holds a session up.

    `available` means that writes work: anything that fails or is slow ends it, only a write begins it again.
    """

    def __init__(
        self,
        store: RecordStore,
        *,
        interval_s: float,
        every_steps: int,
        timeout_s: float,
        metrics: CheckpointMetrics,
        on_written: Callable[[Session, SessionRecord], None],
        on_refused: Callable[[Session], Awaitable[None]],
    ) -> None:
        self.available = True
        self.available_changed = asyncio.Event()
        self._store = store
        self._interval_s = interval_s
        self._every_steps = every_steps
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._on_written = on_written
        self._on_refused = on_refused
        self._changed: dict[Session, None] = {}  # in the order of their first change
        self._under_way: frozenset[Session] = frozenset()  # that are being written
        self._steps = 0
        self._due = asyncio.Event()
        self._durable_s = time.monotonic()  # what had changed until then is written
        self._rounds = SharedRounds(self._write_round)

    def changed(self, session: Session, steps: int = 0) -> None:
        """Write the session in the next round."""
        self._changed[session] = None
        self._count(steps)

    def all_changed(self, sessions: Iterable[Session], steps: int) -> None:
        """Write these in the next round, of which so many steps were applied in all."""
        self._changed.update(dict.fromkeys(sessions))
        self._count(steps)

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._every_steps and self._steps >= self._every_steps:
            self._due.set()

    def is_changed(self, session: Session) -> bool:
        """Whether it waits for the next round."""
        return session in self._changed

    def forget(self, session: Session) -> None:
        """The session has ended."""
        self._changed.pop(session, None)

    def lag(self) -> tuple[int, float]:
        """How many sessions are not written yet, and for how long at most."""
        unwritten = self._changed.keys() | self._under_way
        return len(unwritten), time.monotonic() - self._durable_s if unwritten else 0.0

    async def run(self) -> None:
        """A round whenever one is due; until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._due.wait()
            except TimeoutError:
                pass
            await self.write_changed()

    async def write_changed(self) -> None:
        """One round: all that have changed until now, in batches. Tries a store that is down in any case."""
        await self._rounds.run()

    async def _write_round(self) -> None:
        self._due.clear()
        self._steps, begun_s = 0, time.monotonic()
        try:
            wrote = await self._write_batches(list(self._changed))
            if not wrote and not self.available:
                await self._write_to_store(self._store.probe())
            self._durable_s = begun_s
        except StoreUnavailable:
            pass  # it is logged, and what was to be written waits for the next round

    async def read(self, key: SessionKey) -> SessionRecord | None:
        """What is stored under the key. Raises StoreUnavailable, RecordUnreadable."""
        return await self.ask(self._store.read(key))

    async def erase(self, fences: Mapping[SessionKey, int]) -> None:
        """Forget these in the store. Raises StoreUnavailable."""
        await self.ask(self._store.erase(fences))

    async def scrub(self, fences: Mapping[SessionKey, int]) -> None:
        """Leave no byte of these in the store, however long it takes. Raises StoreUnavailable."""
        await self._write_to_store(self._store.erase(fences, scrub=True))

    def require_available(self) -> None:
        """Raises StoreUnavailable where nothing can be made durable."""
        if not self._store.durable:
            raise StoreUnavailable("this server keeps sessions in memory only", field="require_durable")
        if not self.available:
            raise _unavailable()

    async def _write_batches(self, waiting: list[Session]) -> bool:
        """Whether there was anything to write. Raises StoreUnavailable."""
        wrote = False
        for start in range(0, len(waiting), BATCH_SESSIONS):
            batch = [s for s in waiting[start : start + BATCH_SESSIONS] if s in self._changed]
            for session in batch:
                del self._changed[session]
            # A store without durability is only asked to keep what has no stream.
            kept = [session for session in batch if self._store.durable or session.owner is None]
            if kept:
                wrote = True
                await self._write(kept)
        return wrote

    async def _write(self, sessions: list[Session]) -> None:
        records = [session.record() for session in sessions]
        start_s = time.perf_counter()
        self._under_way = frozenset(sessions)
        try:
            refused = await self._write_to_store(self._store.write(records)) or ()
        except BaseException:
            self._changed |= {session: None for session in sessions if not session.ended}
            raise
        finally:
            self._under_way = frozenset()
        self._metrics.checkpoint(len(records), time.perf_counter() - start_s)
        lost = []
        for session, record in zip(sessions, records, strict=True):
            if session.ended:
                continue
            if record.key not in refused:
                self._on_written(session, record)
            elif session.fence == record.fence:
                lost.append(session)
            else:  # we have taken it anew meanwhile
                self._changed[session] = None
        for session in lost:
            await self._on_refused(session)

    async def ask(self, operation: Coroutine[Any, Any, Result]) -> Result:
        """Wait for an answer of the store, for so long at most. Raises StoreUnavailable, RecordUnreadable."""
        name, start_s = _name_of(operation), time.perf_counter()
        task = asyncio.ensure_future(operation)
        task.add_done_callback(retrieve)
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await asyncio.shield(task)
            self._metrics.store_asked(name, time.perf_counter() - start_s)
            return result
        except RecordUnreadable:
            raise
        except (TimeoutError, StoreError) as error:
            self._metrics.store_failed(name)
            self._set_available(False, str(error) or f"no answer within {self._timeout_s:g} s")
            raise _unavailable() from None

    async def _write_to_store(self, operation: Coroutine[Any, Any, Result]) -> Result:
        """Wait for the end however long it takes, but tell when that is too long."""
        name, start_s = _name_of(operation), time.perf_counter()
        task = asyncio.ensure_future(operation)
        task.add_done_callback(retrieve)
        done, _ = await asyncio.wait([task], timeout=self._timeout_s)
        if not done:
            self._set_available(False, f"a write takes more than {self._timeout_s:g} s")
        try:
            result = await asyncio.shield(task)
        except StoreError as error:
            self._metrics.store_failed(name)
            self._set_available(False, str(error))
            raise _unavailable() from None
        self._metrics.store_asked(name, time.perf_counter() - start_s)
        self._set_available(True)
        return result

    def _set_available(self, available: bool, why: str = "") -> None:
        if available == self.available:
            return
        self.available = available
        self.available_changed.set()
        self._metrics.store_available(available)
        if available:
            log.info("the session store answers again")
        else:
            log.error("the session store is unavailable; live streams go on, nothing more becomes durable: %s", why)


def _name_of(operation: Coroutine[Any, Any, object]) -> str:
    """`write`, `read` and so on: the method of the store."""
    return getattr(operation, "__name__", "other")


def _unavailable() -> StoreUnavailable:
    return StoreUnavailable("the session store does not answer", retry_after_s=RETRY_AFTER_S)
