"""Takes sessions away that are idle, old or too many."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from service.sessions.limits import SessionLimits, evicted, limit_reached
from service.sessions.record import SessionKey
from service.sessions.session import Owner, Session
from service.sessions.table import SessionTable

log = logging.getLogger(__name__)

LOOKED_AT = 10_000  # sessions in memory at a time, in a few milliseconds


class EvictionMetrics(Protocol):
    """Where evictions are counted."""

    def evicted(self, limit: str) -> None:
        """A session met a limit."""
        ...


def report_eviction(metrics: EvictionMetrics, key: SessionKey, limit: str) -> None:
    """A session that no stream has is gone. Thousands may go at once, so the log has them if it is asked to."""
    metrics.evicted(limit)
    log.debug("session evicted", extra={"session": key.session_id, "limit": limit})


class Evictions:
    """Keeps the limits on a table of sessions."""

    def __init__(
        self,
        table: SessionTable,
        limits: SessionLimits,
        metrics: EvictionMetrics,
        leave: Callable[[Session, Owner], None],
    ) -> None:
        self._table = table
        self._limits = limits
        self._metrics = metrics
        self._leave = leave
        self._to_look_at: list[Session] = []

    def make_room(self, tenant: str) -> None:
        """Evict the longest parked session where one more would be too many. Raises SessionLimit if none is parked."""
        limits, keys = self._limits, self._table.keys
        if len(keys) >= limits.max_sessions and not self._evict_longest_parked("max_sessions"):
            raise limit_reached("max_sessions", limits.max_sessions)
        if keys.of_tenant(tenant) >= limits.max_sessions_per_tenant > 0 and not self._evict_longest_parked(
            "max_sessions_per_tenant", tenant
        ):
            raise limit_reached("max_sessions_per_tenant", limits.max_sessions_per_tenant)

    def enforce_in_memory(self, now_s: float) -> None:
        """Evict what is idle, or old; of many sessions some at a time, so that nobody waits for a look at all."""
        if not self._to_look_at:
            self._to_look_at = list(self._table.in_memory.values())
        for session in self._to_look_at[-LOOKED_AT:]:
            if self._table.in_memory.get(session.key) is session:
                self._enforce_on(session, now_s)
        del self._to_look_at[-LOOKED_AT:]

    def enforce_on_parked(self, now_s: float) -> None:
        """Evict what is old or too much of what the table knows of the store."""
        self._evict_parked_ones(now_s)
        self._evict_surplus()

    def _enforce_on(self, session: Session, now_s: float) -> None:
        """A session that is too old ends; a stream that is idle loses its session, which is parked."""
        limits, owner = self._limits, session.owner
        if limits.max_age_s and now_s - session.opened_s > limits.max_age_s:
            self._evict(session, "max_session_age_s")
            if owner is not None:
                owner.lose(evicted("max_session_age_s", resumable=False))
        elif owner is None and now_s - session.used_s > limits.resume_window_s:
            self._evict(session, "resume_window_s")
        elif owner is not None and limits.idle_timeout_s and now_s - session.used_s > limits.idle_timeout_s:
            self._leave(session, owner)
            self._metrics.evicted("idle_timeout_s")
            owner.lose(evicted("idle_timeout_s", resumable=session.resumable))

    def _evict_parked_ones(self, now_s: float) -> None:
        limits, parked = self._limits, self._table.parked
        while (longest := next(iter(parked), None)) and now_s - longest.used_s > limits.resume_window_s:
            self._evict_parked(longest.key, "resume_window_s")
        if limits.max_age_s:
            too_old = [summary.key for summary in parked if now_s - summary.opened_s > limits.max_age_s]
            for key in too_old:
                self._evict_parked(key, "max_session_age_s")

    def _evict_surplus(self) -> None:
        """What is too much because a limit is lower than it was at the last start, or because sessions have grown."""
        while len(self._table.keys) > self._limits.max_sessions and self._evict_longest_parked("max_sessions"):
            pass
        self._evict_surplus_of_tenants()
        self._evict_surplus_bytes()

    def _evict_surplus_of_tenants(self) -> None:
        keys, most = self._table.keys, self._limits.max_sessions_per_tenant
        for tenant in keys.tenants_above(most) if most else ():
            while keys.of_tenant(tenant) > most and self._evict_longest_parked("max_sessions_per_tenant", tenant):
                pass

    def _evict_surplus_bytes(self) -> None:
        table, most_bytes = self._table, self._limits.max_parked_bytes
        unwritten_bytes = table.unwritten_bytes()
        while len(table.parked) and table.parked.size_bytes + unwritten_bytes > most_bytes > 0:
            self._evict_longest_parked("max_parked_bytes")
        while not len(table.parked) and table.unwritten_bytes() > most_bytes > 0:
            self._evict_longest_parked("max_parked_bytes")

    def _evict_longest_parked(self, limit: str, tenant: str | None = None) -> bool:
        """Whether there was one, of the tenant if it matters; those in the store are parked the longest."""
        key = next((summary.key for summary in self._table.parked if tenant in (None, summary.key.tenant)), None)
        if key is not None:
            self._evict_parked(key, limit)
            return True
        session = next((s for s in self._table.unwritten() if tenant in (None, s.key.tenant)), None)
        if session is not None:
            self._evict(session, limit)
        return session is not None

    def _evict(self, session: Session, limit: str) -> None:
        self._table.end(session)
        self._remember(session.key, limit)

    def _evict_parked(self, key: SessionKey, limit: str) -> None:
        self._table.end_parked(key)
        self._remember(key, limit)

    def _remember(self, key: SessionKey, limit: str) -> None:
        self._table.departed.remember(key, limit)
        report_eviction(self._metrics, key, limit)
