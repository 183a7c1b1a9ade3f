"""Keeps records in one SQLite file, which survives the death of the process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from models.manifest import model_key
from service.sessions.record import SessionKey, SessionRecord, SessionSummary
from service.sessions.stores.record_codec import decode_record, encode_record
from service.sessions.stores.sqlite_file import SqliteFile
from service.sessions.stores.sqlite_schema import COLUMNS, KEY, UPDATE
from service.sessions.stores.store import CLOSE_TIMEOUT_S

# Not REPLACE, which would move the row: a record of unchanged size is overwritten in its place.
WRITE = f"""
INSERT INTO sessions ({COLUMNS}, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (tenant, session_id) DO UPDATE SET {UPDATE}
"""
READ = f"SELECT record FROM sessions WHERE {KEY}"
ERASE = f"DELETE FROM sessions WHERE {KEY}"
SUMMARIES = f"SELECT {COLUMNS} FROM sessions ORDER BY used_s"


class SqliteStore:
    """For a process that is alone: it knows what is in the file, and asks only for the records."""

    durable = True

    def __init__(self, file: Path, *, power_loss_safe: bool = False, busy_timeout_s: float = 1.0) -> None:
        self._file = SqliteFile(file, power_loss_safe=power_loss_safe, busy_timeout_s=busy_timeout_s)

    async def open(self) -> list[SessionSummary]:
        return await self._file.connect(lambda connection: [summary_from(row) for row in connection.execute(SUMMARIES)])

    async def write(self, records: Sequence[SessionRecord]) -> None:
        await self._file.write(lambda connection: connection.executemany(WRITE, map(row_of, records)) and None)

    async def read(self, key: SessionKey) -> SessionRecord | None:
        found = await self._file.read(lambda connection: connection.execute(READ, key).fetchall())  # half read locks
        return decode_record(found[0][0]) if found else None

    async def erase(self, keys: Iterable[SessionKey], *, scrub: bool = False) -> None:
        await self._file.write(lambda connection: connection.executemany(ERASE, keys) and None, scrub=scrub)

    async def probe(self) -> None:
        await self._file.probe()

    def end_scrubs(self) -> None:
        self._file.end_scrubs()

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        await self._file.close(timeout_s)


def row_of(record: SessionRecord) -> tuple[Any, ...]:
    """COLUMNS, and the record itself. Raises StoreError."""
    r = record
    return (*r.key, *r.model, r.next_step, r.opened_s, r.used_s, r.size_bytes, encode_record(r))


def summary_from(columns: Sequence[Any]) -> SessionSummary:
    """Of COLUMNS."""
    tenant, session_id, model_name, model_version, *others = columns
    return SessionSummary(SessionKey(tenant, session_id), model_key(model_name, model_version), *others)
