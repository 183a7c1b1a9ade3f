"""Keeps records in one SQLite file, which survives the death of the process."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from models.manifest import ModelKey
from service.sessions.record import SessionKey, SessionRecord, SessionSummary
from service.sessions.stores.daemon_thread import DaemonThread
from service.sessions.stores.record_codec import decode_record, encode_record
from service.sessions.stores.store import CLOSE_TIMEOUT_S, StoreError

log = logging.getLogger(__name__)

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
PROBE = f"PRAGMA user_version = {len(MIGRATIONS)}"  # writes a page, although it is that already
REWRITE = "VACUUM"  # where SQLite moves rows between pages it leaves copies behind, which secure_delete does not see
EMPTY_LOG = "PRAGMA wal_checkpoint(TRUNCATE)"
SUMMARIES = """
SELECT tenant, session_id, model_name, model_version, next_step, opened_s, used_s, size_bytes
FROM sessions ORDER BY used_s
"""


class SqliteStore:
    """Two connections, each in a thread of its own: one writes, one operation after the other, and one only reads.

    So no read waits for a write, however long it takes. What is written survives the death of the process; with
    `power_loss_safe` also that of the machine, at the cost of a flush to the disk in every write. Scrubbing rewrites
    the file: seconds where it has hundreds of megabytes, and meanwhile up to twice its size on the disk besides.
    """

    durable = True

    def __init__(self, file: Path, *, power_loss_safe: bool = False, busy_timeout_s: float = 1.0) -> None:
        self._file = file
        self._synchronous = "FULL" if power_loss_safe else "NORMAL"
        self._busy_timeout_s = busy_timeout_s
        self._writing = DaemonThread("session-store")
        self._reading = DaemonThread("session-store-reads")
        self._writer: sqlite3.Connection | None = None  # each of its thread
        self._reader: sqlite3.Connection | None = None
        self._scrubbing = False
        self._scrubs_ended = False
        self._log_is_left = False
        self._closed = False

    async def open(self) -> list[SessionSummary]:
        return await self._do(self._writing, self._summaries)

    async def write(self, records: Sequence[SessionRecord]) -> None:
        await self._do(self._writing, lambda: self._write(records))

    async def read(self, key: SessionKey) -> SessionRecord | None:
        return await self._do(self._reading, lambda: self._read(key))

    async def erase(self, keys: Iterable[SessionKey], *, scrub: bool = False) -> None:
        await self._do(self._writing, lambda: self._erase(keys, scrub))

    async def probe(self) -> None:
        await self._do(self._writing, self._probe)

    def end_scrubs(self) -> None:
        self._scrubs_ended = True
        if self._scrubbing:
            _interrupt(self._writer)

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        if self._closed:
            return
        self._closed = True
        _interrupt(self._writer)
        _interrupt(self._reader)
        try:
            async with asyncio.timeout(timeout_s):
                with self._explained():
                    await self._reading.do(self._close_reader)  # first, for the last one to close tidies up
                    await self._writing.do(self._close_writer)
        except TimeoutError:
            log.error("the session store %s does not end within %g s, and is left to itself", self._file, timeout_s)
        finally:
            self._reading.end()
            self._writing.end()

    async def _do(self, thread: DaemonThread, operation: Callable[[], Result]) -> Result:
        def unless_closed() -> Result:
            self._require_open()
            return operation()

        self._require_open()  # for the thread ends, too
        with self._explained():
            return await thread.do(unless_closed)

    def _require_open(self) -> None:
        if self._closed:
            raise StoreError(f"the session store {self._file} is closed")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, OverflowError) as error:
            raise StoreError(f"the session store {self._file} failed: {error}") from error

    # What follows runs in the thread that reads.

    def _read(self, key: SessionKey) -> SessionRecord | None:
        if self._reader is None:
            uri = f"{self._file.absolute().as_uri()}?mode=ro"
            self._reader = sqlite3.connect(uri, uri=True, timeout=self._busy_timeout_s, isolation_level=None)
        found = self._reader.execute(READ, key).fetchall()  # to the end, for what is half read keeps the log
        return decode_record(found[0][0]) if found else None

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # What follows runs in the thread that writes.

    def _summaries(self) -> list[SessionSummary]:
        return [
            SessionSummary(SessionKey(tenant, session_id), ModelKey(name, version), *others)
            for tenant, session_id, name, version, *others in self._connected().execute(SUMMARIES)
        ]

    def _write(self, records: Sequence[SessionRecord]) -> None:
        rows = [(*r.key, *r.model, r.next_step, r.opened_s, r.used_s, r.size_bytes, encode_record(r)) for r in records]
        with self._transaction() as connection:
            connection.executemany(WRITE, rows)

    def _erase(self, keys: Iterable[SessionKey], scrub: bool) -> None:
        with self._transaction() as connection:
            connection.executemany(ERASE, keys)
        if scrub:
            self._scrub(connection)

    def _scrub(self, connection: sqlite3.Connection) -> None:
        self._scrubbing = True
        try:
            self._require_scrubs()
            connection.execute(REWRITE)
            self._require_scrubs()
            busy, *_ = connection.execute(EMPTY_LOG).fetchone()
        except (sqlite3.Error, StoreError):
            if self._scrubs_ended:
                self._leave_log(connection)
            raise
        finally:
            self._scrubbing = False
        if busy:
            raise StoreError(f"the session store {self._file} is read by another process: its log keeps old bytes")

    def _require_scrubs(self) -> None:
        if self._scrubs_ended:
            raise StoreError(f"the session store {self._file} ends soon: its file keeps old bytes")

    def _leave_log(self, connection: sqlite3.Connection) -> None:
        """It may be as large as the file, and to empty it takes seconds that there are not: the next start does."""
        self._log_is_left = True
        connection.execute("PRAGMA wal_autocheckpoint = 0")

    def _probe(self) -> None:
        with self._transaction() as connection:
            connection.execute(PROBE)

    def _close_writer(self) -> None:
        if self._writer is not None and not self._log_is_left:
            try:
                self._writer.execute(EMPTY_LOG)
            finally:
                self._writer.close()
                self._writer = None

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
        if self._writer is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._file, timeout=self._busy_timeout_s, isolation_level=None)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._writer = connection
        return self._writer

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


def _interrupt(connection: sqlite3.Connection | None) -> None:
    """From any thread: what it runs fails, soon."""
    if connection is not None:
        with suppress(sqlite3.ProgrammingError):  # closed meanwhile
            connection.interrupt()
