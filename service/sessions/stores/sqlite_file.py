"""One SQLite file: a connection that writes and one that only reads, each in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from service.sessions.stores.daemon_thread import DaemonThread
from service.sessions.stores.sqlite_schema import MIGRATIONS
from service.sessions.stores.store import StoreError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
WAL_TIMEOUT_S = 1.0
Operation = Callable[[sqlite3.Connection], Result]

PROBE = f"PRAGMA user_version = {len(MIGRATIONS)}"  # writes a page, although it is that already
REWRITE = "VACUUM"  # where SQLite moves rows between pages it leaves copies behind, which secure_delete does not see
EMPTY_LOG = "PRAGMA wal_checkpoint(TRUNCATE)"


class SqliteFile:
    """No read waits for a write, however long it takes. Whatever is awaited raises StoreError.

    What is written survives the death of the process; with `power_loss_safe` also that of the machine, at the cost of a
    flush to the disk in every write.
    """

    def __init__(self, file: Path, *, power_loss_safe: bool, busy_timeout_s: float) -> None:
        self.scrubbing = False
        self._file = file
        self._synchronous = "FULL" if power_loss_safe else "NORMAL"
        self._busy_timeout_s = busy_timeout_s
        self._writing = DaemonThread("session-store")
        self._reading = DaemonThread("session-store-reads")
        self._writer: sqlite3.Connection | None = None  # each of its thread
        self._reader: sqlite3.Connection | None = None
        self._scrubs_ended = False
        self._log_is_left = False
        self._closed = False

    async def connect(self, operation: Operation[Result]) -> Result:
        """What the operation returns, which only reads, on the connection that writes: it makes and migrates the file.

        Not only this connects, so that a store that could not be opened works once its fault is gone.
        """
        return await self._do(self._writing, lambda: operation(self._connected()))

    async def read(self, operation: Operation[Result]) -> Result:
        """What the operation returns, which only reads."""
        return await self._do(self._reading, lambda: operation(self._connected_reader()))

    async def write(self, operation: Operation[Result], *, scrub: bool = False) -> Result:
        """What the operation returns, all of it done or nothing; with `scrub` the file is rewritten then.

        That takes seconds where it has hundreds of megabytes, and meanwhile up to twice its size on the disk besides.
        """

        def write() -> Result:
            with self._transaction() as connection:
                result = operation(connection)
            if scrub:
                self._scrub(connection)
            return result

        return await self._do(self._writing, write)

    async def probe(self) -> None:
        """Write something that changes nothing."""
        await self.write(lambda connection: connection.execute(PROBE) and None)

    def end_scrubs(self) -> None:
        """One that runs fails soon, and so does each that comes."""
        self._scrubs_ended = True
        if self.scrubbing:
            _interrupt(self._writer)

    async def close(self, timeout_s: float) -> None:
        """End, and leave to itself what takes longer."""
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

    def _connected_reader(self) -> sqlite3.Connection:
        if self._reader is None:
            uri = f"{self._file.absolute().as_uri()}?mode=ro"
            self._reader = sqlite3.connect(uri, uri=True, timeout=self._busy_timeout_s, isolation_level=None)
        return self._reader

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # What follows runs in the thread that writes.

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

    def _scrub(self, connection: sqlite3.Connection) -> None:
        self.scrubbing = True
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
            self.scrubbing = False
        if busy:
            raise StoreError(f"the session store {self._file} is read by another process: its log keeps old bytes")

    def _require_scrubs(self) -> None:
        if self._scrubs_ended:
            raise StoreError(f"the session store {self._file} ends soon: its file keeps old bytes")

    def _leave_log(self, connection: sqlite3.Connection) -> None:
        """It may be as large as the file, and to empty it takes seconds that there are not: the next start does."""
        self._log_is_left = True
        connection.execute("PRAGMA wal_autocheckpoint = 0")

    def _close_writer(self) -> None:
        if self._writer is not None and not self._log_is_left:
            try:
                self._writer.execute(EMPTY_LOG)
            finally:
                self._writer.close()
                self._writer = None

    def _connected(self) -> sqlite3.Connection:
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
        version = _version(connection)
        if version > len(MIGRATIONS):
            raise StoreError(
                f"the session store {self._file} has schema version {version}; this server knows {len(MIGRATIONS)}"
            )
        _use_write_ahead_log(connection)
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        connection.execute("PRAGMA secure_delete = ON")  # freed bytes become zeros
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            try:
                connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
            except sqlite3.Error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if _version(connection) < number:  # else another process was quicker
                    raise


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Where another process does the same at this moment, SQLite says that the file is locked, and does not wait."""
    until_s = time.monotonic() + WAL_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.01)


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def _interrupt(connection: sqlite3.Connection | None) -> None:
    """From any thread: what it runs fails, soon."""
    if connection is not None:
        with suppress(sqlite3.ProgrammingError):  # closed meanwhile
            connection.interrupt()
