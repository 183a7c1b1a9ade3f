"""Sessions in a store that other processes use, too: who has a session, and how it changes hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from service.errors import ServingError, SessionMoved, SessionNotFound, StoreUnavailable
from service.sessions.checkpoints import Checkpointer
from service.sessions.erasure import Erasure
from service.sessions.lease import Lease
from service.sessions.record import SessionKey, SessionRecord
from service.sessions.session import Owner, Session
from service.sessions.shared_evictions import SharedEvictions
from service.sessions.stored import Check
from service.sessions.stores.shared import SharedStore, StoredSession, Wanted
from service.sessions.stores.store import RecordUnreadable, StoreError
from service.sessions.table import SessionInfo, SessionTable

ASK_AGAIN_S = 0.02


@dataclass(frozen=True)
class Sharing:
    """Who we are in a store that several processes use, and for how long we may be silent."""

    owner: str
    lease_s: float


class SharedSessions:
    """Whoever wants a session of another process asks it to let go, and takes it once it has, or is dead."""

    def __init__(
        self,
        store: SharedStore,
        sharing: Sharing,
        table: SessionTable,
        erasure: Erasure,
        evictions: SharedEvictions,
        checkpoints: Checkpointer,
        leave: Callable[[Session, Owner], None],
    ) -> None:
        self._store = store
        self._owner = sharing.owner
        self._lease_s = lease_s = sharing.lease_s
        self._table = table
        self._erasure = erasure
        self._evictions = evictions
        self._checkpoints = checkpoints
        self._leave = leave
        self._lease = Lease(lambda lease_s: checkpoints.ask(store.renew(lease_s)), self._keep_what_is_ours, lease_s)
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        await self._store.open(self._owner, self._on_wanted)
        try:
            await self._lease.begin()
        except StoreUnavailable as error:
            raise StoreError(str(error)) from None

    async def run(self) -> None:
        await self._lease.run()

    async def may_answer(self) -> None:
        if not self._lease.held:
            await self._lease.wait_until_held()

    async def take(self, key: SessionKey, check: Check) -> SessionRecord | None:
        async with self._patience():
            while record := await self._checkpoints.read(key):
                check(record)
                if taken := await self._take(key, record.fence):
                    return taken
                await self._ask_to_let_go(record.owner, Wanted(key, deleted=False))
            return None

    async def _take(self, key: SessionKey, fence: int) -> SessionRecord | None:
        """Whoever wants it may be gone by the time that it is ours."""
        taking = asyncio.ensure_future(self._checkpoints.ask(self._store.take(key, fence)))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._begin(self._give_back(taking))
            raise

    async def _give_back(self, taking: Awaitable[SessionRecord | None]) -> None:
        with suppress(StoreUnavailable, RecordUnreadable):  # then it stays ours until somebody wants it here
            if taken := await taking:
                await self._checkpoints.ask(self._store.write([replace(taken, owner="")]))

    async def end(self, key: SessionKey) -> bool:
        was_there = False
        async with self._patience():
            while stored := await self._checkpoints.ask(self._store.find(key)):
                was_there = True
                if taken := await self._checkpoints.ask(self._store.take(key, stored.fence)):
                    self._erasure.add(key, taken.fence)
                    break
                await self._ask_to_let_go(stored.owner, Wanted(key, deleted=True))
        return was_there

    async def read(self, key: SessionKey) -> SessionRecord | None:
        return await self._checkpoints.read(key)

    async def keep(self, session: Session) -> bool:
        with suppress(StoreUnavailable):  # then nobody else can have taken it just now
            return await self._retake(session)
        return True

    async def bury(self, owners: Sequence[str]) -> None:
        with suppress(StoreUnavailable):  # then their leases end by themselves
            await self._checkpoints.ask(self._store.bury(owners))

    async def make_room(self, tenant: str) -> None:
        await self._evictions.make_room(tenant)

    async def enforce_limits(self, now_s: float) -> None:
        await self._evictions.enforce(now_s)

    async def find(self, key: SessionKey) -> SessionInfo | None:
        if here := self._table.find(key):
            return here
        stored = await self._checkpoints.ask(self._store.find(key))
        return _info(stored) if stored else None

    async def after(self, key: SessionKey, sessions: int) -> list[SessionInfo]:
        found = {
            info.summary.key: info for info in map(_info, await self._checkpoints.ask(self._store.after(key, sessions)))
        }
        found |= {k: here for k in self._table.keys.after(key, sessions) if (here := self._table.find(k))}
        return [found[k] for k in sorted(found)[:sessions]]

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """Until any lease has run out."""
        try:
            async with asyncio.timeout(2 * self._lease_s):
                yield
        except TimeoutError:
            raise StoreUnavailable("the session's owner does not let go of it", retry_after_s=self._lease_s) from None

    async def _ask_to_let_go(self, owner: str, wanted: Wanted) -> None:
        if owner:
            await self._checkpoints.ask(self._store.want(owner, wanted))
        await asyncio.sleep(ASK_AGAIN_S)

    def _on_wanted(self, wanted: Wanted) -> None:
        """Another process asks us to let go of a session."""
        session = self._table.in_memory.get(wanted.key)
        if session is None:
            return
        owner = session.owner
        if wanted.deleted:
            self._table.end(session)
            self._table.departed.remember(wanted.key)
            error: ServingError = SessionNotFound("the session was deleted", field="session_id")
            work = self._erasure.erase()
        else:
            if owner is not None:
                self._leave(session, owner)
            error = SessionMoved("another server has this session now")
            work = self._checkpoints.write_changed()
        if owner is not None:
            owner.lose(error)
        self._begin(work)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Without waiting for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_what_is_ours(self) -> None:
        """After a pause in which others may have taken any session."""
        for session in list(self._table.in_memory.values()):
            if session.resumable and not session.ended and not await self._retake(session):
                self._table.lose(session)

    async def _retake(self, session: Session) -> bool:
        if not session.stored:  # nobody else can know of it
            return True
        taken = await self._checkpoints.ask(self._store.take(session.key, session.fence))
        if taken is not None:
            session.fence = taken.fence
            return True
        stored = await self._checkpoints.ask(self._store.find(session.key))
        if stored is None or stored.owner != self._owner:
            return False
        session.fence = stored.fence  # of a take of ours whose answer was lost on its way
        return True


def _info(stored: StoredSession) -> SessionInfo:
    return SessionInfo(stored.summary, live=stored.owner != "" and stored.owner_lives)
