"""The limits on sessions that no stream has, in a store that several processes use."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from models.manifest import ModelKey
from service.errors import StoreUnavailable
from service.sessions.checkpoints import Checkpointer
from service.sessions.erasure import Erasure
from service.sessions.evictions import EvictionMetrics, report_eviction
from service.sessions.limits import SessionLimits, limit_reached
from service.sessions.stores.shared import SharedStore, StoredSession
from service.sessions.table import SessionTable, TableMetrics

AT_A_TIME = 100


class StoredMetrics(EvictionMetrics, TableMetrics, Protocol):
    """Where sessions are counted that no stream has."""


class SharedEvictions:
    """Every process keeps the limits for all. Whoever takes a session evicts it, so none is evicted twice.

    While the store is down no limit is kept, for nothing can be told of what is there.
    """

    def __init__(
        self,
        store: SharedStore,
        table: SessionTable,
        erasure: Erasure,
        checkpoints: Checkpointer,
        limits: SessionLimits,
        metrics: StoredMetrics,
    ) -> None:
        self._store = store
        self._table = table
        self._erasure = erasure
        self._checkpoints = checkpoints
        self._limits = limits
        self._metrics = metrics
        self._models: set[ModelKey] = set()  # of which sessions were parked once

    async def make_room(self, tenant: str) -> None:
        """For one more session of the tenant. Raises SessionLimit if no other is parked."""
        with suppress(StoreUnavailable):
            await self._make_room("max_sessions", self._limits.max_sessions, None)
            await self._make_room("max_sessions_per_tenant", self._limits.max_sessions_per_tenant, tenant)

    async def enforce(self, now_s: float) -> None:
        """Evict what is too long unused or too much, and tell the metrics what is left."""
        with suppress(StoreUnavailable):
            await self._evict_unused(now_s - self._limits.resume_window_s)
            await self._evict_surplus()
            await self._count()

    async def _count(self) -> int:
        """Tell the metrics what is parked; the bytes of it."""
        totals = await self._checkpoints.ask(self._store.parked_totals())
        self._models |= totals.keys()
        size_bytes = sum(of_model.size_bytes for of_model in totals.values())
        sessions = {model: totals[model].sessions if model in totals else 0 for model in self._models}
        self._metrics.parked(sessions, size_bytes)
        return size_bytes

    async def _make_room(self, limit: str, most: int, tenant: str | None) -> None:
        while most and (await self._checkpoints.ask(self._store.totals(tenant))).sessions >= most:
            longest = await self._checkpoints.ask(self._store.longest_parked(1, tenant=tenant))
            if not longest:
                raise limit_reached(limit, most)
            await self._evict(longest, limit)
            await self._erasure.erase()

    async def _evict_unused(self, since_s: float) -> None:
        while unused := await self._checkpoints.ask(self._store.longest_parked(AT_A_TIME, used_before_s=since_s)):
            await self._evict(unused, "resume_window_s")
            await self._erasure.erase()
            if len(unused) < AT_A_TIME:
                return

    async def _evict_surplus(self) -> None:
        most_bytes = self._limits.max_parked_bytes
        surplus_bytes = await self._count() - most_bytes
        while most_bytes and surplus_bytes > 0:
            longest = await self._checkpoints.ask(self._store.longest_parked(AT_A_TIME))
            if not longest:
                return
            for stored in longest:
                if surplus_bytes > 0:
                    surplus_bytes -= stored.summary.size_bytes
                    await self._evict([stored], "max_parked_bytes")
            await self._erasure.erase()

    async def _evict(self, sessions: list[StoredSession], limit: str) -> None:
        for stored in sessions:
            key = stored.summary.key
            if taken := await self._checkpoints.ask(self._store.take(key, stored.fence)):
                self._erasure.add(key, taken.fence)
                self._table.departed.remember(key, limit)
                report_eviction(self._metrics, key, limit)
