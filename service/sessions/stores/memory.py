"""Keeps records in this process, and so for as long as it lives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from service.sessions.record import SessionKey, SessionRecord, SessionSummary, summary_of
from service.sessions.stores.store import CLOSE_TIMEOUT_S


class MemoryStore:
    """A dict. It holds the records themselves, which never change, and not copies of them."""

    durable = False

    def __init__(self) -> None:
        self._records: dict[SessionKey, SessionRecord] = {}

    async def open(self) -> list[SessionSummary]:
        return sorted(map(summary_of, self._records.values()), key=lambda summary: summary.used_s)

    async def write(self, records: Sequence[SessionRecord]) -> None:
        self._records |= {record.key: record for record in records}

    async def read(self, key: SessionKey) -> SessionRecord | None:
        return self._records.get(key)

    async def erase(self, keys: Iterable[SessionKey], *, scrub: bool = False) -> None:  # noqa: ARG002 - there is no file
        for key in keys:
            self._records.pop(key, None)

    async def probe(self) -> None:
        pass

    def end_scrubs(self) -> None:
        pass

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        pass
