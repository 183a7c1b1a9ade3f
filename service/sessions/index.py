"""Keys of sessions, kept such that no question about them takes a walk through all of them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile

from sortedcontainers import SortedList

from models.manifest import ModelKey
from service.errors import ServingError, SessionNotFound
from service.sessions.limits import evicted
from service.sessions.record import SessionKey, SessionSummary

REMEMBERED = 100_000


class SessionKeys:
    """The keys of all sessions in their order, and how many each tenant has."""

    def __init__(self) -> None:
        self._sorted: SortedList[SessionKey] = SortedList()
        self._per_tenant: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._sorted)

    def update(self, keys: Iterable[SessionKey]) -> None:
        """Add these, which are new."""
        added = list(keys)
        self._sorted.update(added)
        self._per_tenant.update(key.tenant for key in added)

    def remove(self, key: SessionKey) -> None:
        self._sorted.remove(key)
        self._per_tenant[key.tenant] -= 1

    def of_tenant(self, tenant: str) -> int:
        """How many the tenant has."""
        return self._per_tenant[tenant]

    def tenants_above(self, sessions: int) -> list[str]:
        """Those that have more."""
        return [tenant for tenant, count in self._per_tenant.items() if count > sessions]

    def after(self, key: SessionKey, count: int) -> list[SessionKey]:
        """So many of the key's tenant at most, behind that key."""
        behind = self._sorted.irange(minimum=key, inclusive=(False, True))
        return list(islice(takewhile(lambda other: other.tenant == key.tenant, behind), count))


class Parked:
    """Summaries of the sessions that only the store has, the longest unused first."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.per_model: Counter[ModelKey] = Counter()
        self._summaries: OrderedDict[SessionKey, SessionSummary] = OrderedDict()

    def __len__(self) -> int:
        return len(self._summaries)

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._summaries

    def __iter__(self) -> Iterator[SessionSummary]:
        return iter(self._summaries.values())

    def get(self, key: SessionKey) -> SessionSummary | None:
        return self._summaries.get(key)

    def add(self, summary: SessionSummary) -> None:
        self._summaries[summary.key] = summary
        self.size_bytes += summary.size_bytes
        self.per_model[summary.model] += 1

    def remove(self, key: SessionKey) -> None:
        summary = self._summaries.pop(key)
        self.size_bytes -= summary.size_bytes
        self.per_model[summary.model] -= 1


class Departed:
    """Why sessions are gone for which their clients may ask; the oldest are forgotten."""

    def __init__(self) -> None:
        self._limits: OrderedDict[SessionKey, str] = OrderedDict()  # that it met; "" = it was deleted

    def __contains__(self, key: SessionKey) -> bool:
        return key in self._limits

    def remember(self, key: SessionKey, limit: str = "") -> None:
        """The session was deleted, or met the limit."""
        self._limits[key] = limit
        if len(self._limits) > REMEMBERED:
            self._limits.popitem(last=False)

    def forget(self, key: SessionKey) -> None:
        """Another session has the id."""
        self._limits.pop(key, None)

    def error(self, key: SessionKey) -> ServingError:
        """What is said of a session that is not there."""
        if limit := self._limits.get(key):
            return evicted(limit, resumable=False)
        return SessionNotFound(f"there is no session {key.session_id!r}", field="session_id")
