"""Keeps records in one SQLite file, which survives the death of the process."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from models.manifest import ModelKey
from service.sessions.record import SessionKey, SessionRecord, SessionSummary
from service.sessions.stores.record_codec import decode_record, encode_record
from service.sessions.stores.store import StoreError

Result = TypeVar("Result")

# The script at index n makes schema version n + 1 of version n. Those that were released never change.
MIGRATIONS = [
    """
    CREATE TABLE sessions (
        tenant TEXT NOT NULL,
        session_id TEXT NOT NULL,
        model_name TEXT NOT NULL,
        model_version INTEGER NOT NULL,
        next_step INTEGER NOT NULL,
        opened_s REAL NOT NULL,
        used_s REAL NOT NULL,
        size_bytes INTEGER NOT NULL,
        record BLOB NOT NULL,
        UNIQUE (tenant, session_id)
    );
    -- All that a summary needs, so that opening reads no record.
    CREATE INDEX summaries ON sessions
        (used_s, tenant, session_id, model_name, model_version, next_step, opened_s, size_bytes);
    """,
]

# Not REPLACE, which would move the row: a record of unchanged size is overwritten in its place.
WRITE = """
INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (tenant, session_id) DO UPDATE SET
    model_name = excluded.model_name, model_version = excluded.model_version, next_step = excluded.next_step,
    opened_s = excluded.opened_s, used_s = excluded.used_s, size_bytes = excluded.size_bytes, record = excluded.record
"""
READ = "SELECT record FROM sessions WHERE tenant = ? AND session_id = ?"
ERASE = "DELETE FROM sessions WHERE tenant = ? AND session_id = ?"
SUMMARIES = """
SELECT tenant, session_id, model_name, model_version, next_step, opened_s, used_s, size_bytes
FROM sessions ORDER BY used_s
"""


class SqliteStore:
    """One connection in a thread of its own, which does one operation after the other.

    What is written survives the death of the process; with `power_loss_safe` also that of the machine, at the cost
    of a flush to the disk in every write. Scrubbing rewrites the file: seconds where it has hundreds of megabytes, and
    meanwhile up to twice its size on the disk besides.
    """

    durable = True

    def __init__(self, file: Path, *, power_loss_safe: bool = False, busy_timeout_s: float = 1.0) -> None:
        self._file = file
        self._synchronous = "FULL" if power_loss_safe else "NORMAL"
        self._busy_timeout_s = busy_timeout_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="session-store")
        self._connection: sqlite3.Connection | None = None  # of the thread
        self._closed = False

    async def open(self) -> list[SessionSummary]:
        return await self._in_thread(self._summaries)

    async def write(self, records: Sequence[SessionRecord]) -> None:
        await self._in_thread(lambda: self._write(records))

    async def read(self, key: SessionKey) -> SessionRecord | None:
        return await self._in_thread(lambda: self._read(key))

    async def erase(self, keys: Sequence[SessionKey], *, scrub: bool = False) -> None:
        await self._in_thread(lambda: self._erase(keys, scrub))

    async def close(self) -> None:
        if not self._closed:
            try:
                await self._in_thread(self._close)
            finally:
                self._closed = True
                self._thread.shutdown(wait=False)

    async def _in_thread(self, operation: Callable[[], Result]) -> Result:
        if self._closed:
            raise StoreError(f"the session store {self._file} is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, operation)
        except (sqlite3.Error, OSError, OverflowError) as error:
            raise StoreError(f"the session store {self._file} failed: {error}") from error

    # What follows runs in the thread.

    def _summaries(self) -> list[SessionSummary]:
        return [
            SessionSummary(SessionKey(tenant, session_id), ModelKey(name, version), *others)
            for tenant, session_id, name, version, *others in self._connected().execute(SUMMARIES)
        ]

    def _write(self, records: Sequence[SessionRecord]) -> None:
        rows = [(*r.key, *r.model, r.next_step, r.opened_s, r.used_s, r.size_bytes, encode_record(r)) for r in records]
        with self._transaction() as connection:
            connection.executemany(WRITE, rows)

    def _read(self, key: SessionKey) -> SessionRecord | None:
        found = self._connected().execute(READ, key).fetchone()
        return None if found is None else decode_record(found[0])

    def _erase(self, keys: Sequence[SessionKey], scrub: bool) -> None:
        with self._transaction() as connection:
            connection.executemany(ERASE, keys)
        if scrub:
            # Where SQLite moves rows between pages it leaves copies behind, which secure_delete does not see.
            connection.execute("VACUUM")
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise StoreError(f"the session store {self._file} is read by another process: its log keeps old bytes")

    def _close(self) -> None:
        if self._connection is not None:
            try:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connected()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite ends it by itself after some errors
                connection.execute("ROLLBACK")
            raise

    def _connected(self) -> sqlite3.Connection:
        """Not only `open` connects, so that a store that could not be opened works once its fault is gone."""
        if self._connection is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._file, timeout=self._busy_timeout_s, isolation_level=None)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the session store {self._file} has schema version {version}; this server knows {len(MIGRATIONS)}"
            )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        connection.execute("PRAGMA secure_delete = ON")  # freed bytes become zeros
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
