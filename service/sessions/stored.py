"""The sessions that the store has and this process has not in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from service.sessions.checkpoints import Checkpointer
from service.sessions.evictions import Evictions
from service.sessions.record import SessionKey, SessionRecord
from service.sessions.session import Session
from service.sessions.stores.store import SessionStore
from service.sessions.table import SessionInfo, SessionTable

Check = Callable[[SessionRecord], None]
"""Raises why somebody may not have the session."""


class StoredSessions(Protocol):
    """Finds them, takes them and keeps the limits on them."""

    async def open(self) -> None:
        """Begin. Raises StoreError."""
        ...

    async def run(self) -> None:
        """What must be done again and again; until cancelled."""
        ...

    async def take(self, key: SessionKey, check: Check) -> SessionRecord | None:
        """The session for this process, if there is one. Raises StoreUnavailable, RecordUnreadable, and what `check`
        raises; then nothing has changed."""
        ...

    async def read(self, key: SessionKey) -> SessionRecord | None:
        """The last checkpoint of a session that is not in memory. Raises StoreUnavailable, RecordUnreadable."""
        ...

    async def keep(self, session: Session) -> bool:
        """Whether a session in memory that has no stream is still ours. Raises StoreUnavailable."""
        ...

    async def make_room(self, tenant: str) -> None:
        """For one more session of the tenant. Raises SessionLimit."""
        ...

    async def enforce_limits(self, now_s: float) -> None:
        """Evict what is too long unused, too old or too much."""
        ...

    async def find(self, key: SessionKey) -> SessionInfo | None:
        """What is known of a session, in memory or not."""
        ...

    async def after(self, key: SessionKey, sessions: int) -> list[SessionInfo]:
        """So many sessions of the key's tenant at most, by id, behind that key."""
        ...

    async def end(self, key: SessionKey) -> bool:
        """End a session that is not in memory, for good. Whether there was one. Raises StoreUnavailable."""
        ...

    async def bury(self, owners: Sequence[str]) -> None:
        """These processes are dead for certain."""
        ...

    async def may_answer(self) -> None:
        """Return once it is certain that the sessions in memory are ours."""
        ...


class SessionsOfOneProcess:
    """Where no other process uses the store, the table knows them all."""

    def __init__(
        self, store: SessionStore, table: SessionTable, evictions: Evictions, checkpoints: Checkpointer
    ) -> None:
        self._store = store
        self._table = table
        self._evictions = evictions
        self._checkpoints = checkpoints

    async def open(self) -> None:
        self._table.add_parked(await self._store.open())

    async def run(self) -> None:
        pass

    async def take(self, key: SessionKey, check: Check) -> SessionRecord | None:
        record = await self.read(key)
        if record is not None:
            check(record)
        return record

    async def read(self, key: SessionKey) -> SessionRecord | None:
        record = await self._checkpoints.read(key) if key in self._table.parked else None
        return record if key in self._table.parked else None  # or somebody has loaded or ended it meanwhile

    async def keep(self, session: Session) -> bool:  # noqa: ARG002 - whose else?
        return True

    async def make_room(self, tenant: str) -> None:
        self._evictions.make_room(tenant)

    async def enforce_limits(self, now_s: float) -> None:
        self._evictions.enforce_on_parked(now_s)
        self._table.count()

    async def find(self, key: SessionKey) -> SessionInfo | None:
        return self._table.find(key)

    async def after(self, key: SessionKey, sessions: int) -> list[SessionInfo]:
        return [info for k in self._table.keys.after(key, sessions) if (info := self._table.find(k))]

    async def end(self, key: SessionKey) -> bool:
        if key not in self._table.parked:
            return False
        self._table.end_parked(key)
        return True

    async def bury(self, owners: Sequence[str]) -> None:
        pass

    async def may_answer(self) -> None:
        pass
