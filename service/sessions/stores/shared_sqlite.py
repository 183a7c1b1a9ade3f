"""One SQLite file that several processes of a machine share."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.manifest import ModelKey, model_key
from service.sessions.record import SessionKey, SessionRecord
from service.sessions.stores.record_codec import decode_record
from service.sessions.stores.shared import StoredSession, Totals, Wanted
from service.sessions.stores.sqlite import row_of, summary_from
from service.sessions.stores.sqlite_file import SqliteFile
from service.sessions.stores.sqlite_schema import COLUMNS, KEY, UPDATE
from service.sessions.stores.store import CLOSE_TIMEOUT_S, StoreError
from service.sessions.stores.wants import Wants

# To insert does not change what is there unless the fence is the same; whatever else is there stays.
WRITE = f"""
INSERT INTO sessions ({COLUMNS}, record, fence, owner) SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?
WHERE ?12 OR EXISTS (SELECT 1 FROM sessions WHERE tenant = ?1 AND session_id = ?2)
ON CONFLICT (tenant, session_id) DO UPDATE SET {UPDATE}, owner = excluded.owner WHERE fence = excluded.fence
"""
READ = f"SELECT record, fence, owner FROM sessions WHERE {KEY}"
LIVING = "SELECT owner FROM owners WHERE boot_id = :boot_id AND expires_s > :now_s"
TAKE = f"""
UPDATE sessions SET fence = fence + 1, owner = :me
WHERE tenant = :tenant AND session_id = :session_id AND fence = :fence
    AND (owner IN ('', :me) OR owner NOT IN ({LIVING}))
RETURNING record, fence, owner
"""
ERASE = f"DELETE FROM sessions WHERE {KEY} AND fence = ?"
STORED = f"SELECT {COLUMNS}, fence, owner, owner IN ({LIVING}) FROM sessions"
FIND = f"{STORED} WHERE tenant = :tenant AND session_id = :session_id"
AFTER = f"{STORED} WHERE tenant = :tenant AND session_id > :session_id ORDER BY session_id LIMIT :sessions"
LONGEST_PARKED = f"""
{STORED} WHERE (owner = '' OR owner NOT IN ({LIVING})) AND (:tenant IS NULL OR tenant = :tenant)
    AND (:used_before_s IS NULL OR used_s < :used_before_s)
ORDER BY used_s LIMIT :sessions
"""
TOTALS = "SELECT total(sessions), total(size_bytes) FROM totals WHERE ? IS NULL OR tenant = ?"
PARKED_TOTALS = "SELECT model_name, model_version, sessions, size_bytes FROM parked"
RENEW = "INSERT OR REPLACE INTO owners VALUES (:me, :boot_id, :expires_s, :port, :secret)"
BURY = "DELETE FROM owners WHERE owner = ?"
ADDRESS = "SELECT port, secret FROM owners WHERE owner = ?"


class SharedSqliteStore:
    """See SharedStore. The clock of leases is the machine's monotonic one, which all its processes share."""

    durable = True

    def __init__(self, file: Path, *, power_loss_safe: bool = False, busy_timeout_s: float = 1.0) -> None:
        self._file = SqliteFile(file, power_loss_safe=power_loss_safe, busy_timeout_s=busy_timeout_s)
        self._boot_id = _boot_id()

    async def open(self, owner: str, on_wanted: Callable[[Wanted], None]) -> None:
        self._owner = owner
        self._wants = Wants(secrets.token_bytes(16), on_wanted)
        await self._wants.open()
        await self.bury([owner])  # nobody, but it makes the file

    async def renew(self, lease_s: float) -> bool:
        def renew(connection: sqlite3.Connection) -> bool:
            had_lived = connection.execute(f"{LIVING} AND owner = :me", self._now()).fetchone() is not None
            lease = {"expires_s": time.monotonic() + lease_s, "port": self._wants.port, "secret": self._wants.secret}
            connection.execute(RENEW, self._now() | lease)
            return had_lived

        return await self._file.write(renew)

    async def bury(self, owners: Iterable[str]) -> None:
        dead = [(owner,) for owner in owners]
        await self._file.write(lambda connection: connection.executemany(BURY, dead) and None)

    async def write(self, records: Sequence[SessionRecord]) -> frozenset[SessionKey]:
        def write(connection: sqlite3.Connection) -> frozenset[SessionKey]:
            rows = ((record.key, (*row_of(record), record.fence, record.owner, record.is_new)) for record in records)
            return frozenset(key for key, row in rows if not connection.execute(WRITE, row).rowcount)

        return await self._file.write(write)

    async def read(self, key: SessionKey) -> SessionRecord | None:
        found = await self._file.read(lambda connection: connection.execute(READ, key).fetchall())
        return _record_from(found)

    async def take(self, key: SessionKey, fence: int) -> SessionRecord | None:
        wanted = self._now() | key._asdict() | {"fence": fence}
        return _record_from(await self._file.write(lambda connection: connection.execute(TAKE, wanted).fetchall()))

    async def erase(self, fences: Mapping[SessionKey, int], *, scrub: bool = False) -> None:
        rows = [(*key, fence) for key, fence in fences.items()]
        await self._file.write(lambda connection: connection.executemany(ERASE, rows) and None, scrub=scrub)

    async def want(self, owner: str, wanted: Wanted) -> None:
        found = await self._file.read(lambda connection: connection.execute(ADDRESS, (owner,)).fetchall())
        for port, secret in found:
            self._wants.tell(port, secret, wanted)

    async def find(self, key: SessionKey) -> StoredSession | None:
        return next(iter(await self._stored(FIND, **key._asdict())), None)

    async def after(self, key: SessionKey, sessions: int) -> list[StoredSession]:
        return await self._stored(AFTER, sessions=sessions, **key._asdict())

    async def longest_parked(
        self, sessions: int, *, tenant: str | None = None, used_before_s: float | None = None
    ) -> list[StoredSession]:
        return await self._stored(LONGEST_PARKED, sessions=sessions, tenant=tenant, used_before_s=used_before_s)

    async def totals(self, tenant: str | None = None) -> Totals:
        found = await self._file.read(lambda connection: connection.execute(TOTALS, (tenant, tenant)).fetchall())
        return Totals(*map(int, found[0]))

    async def parked_totals(self) -> dict[ModelKey, Totals]:
        found = await self._file.read(lambda connection: connection.execute(PARKED_TOTALS).fetchall())
        return {model_key(name, version): Totals(*counts) for name, version, *counts in found}

    async def probe(self) -> None:
        await self._file.probe()

    def end_scrubs(self) -> None:
        self._file.end_scrubs()

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        self._wants.close()
        with suppress(StoreError):  # then the lease runs out by itself
            await self.bury([self._owner])
        await self._file.close(timeout_s)

    def _now(self) -> dict[str, Any]:
        return {"me": self._owner, "boot_id": self._boot_id, "now_s": time.monotonic()}

    async def _stored(self, query: str, **values: Any) -> list[StoredSession]:
        now = self._now()
        rows = await self._file.read(lambda connection: connection.execute(query, now | values).fetchall())
        return [
            StoredSession(summary_from(columns), fence, owner, bool(lives)) for *columns, fence, owner, lives in rows
        ]


def _record_from(found: list[tuple[bytes, int, str]]) -> SessionRecord | None:
    """Of at most one row of record, fence and owner. Raises RecordUnreadable."""
    return next((replace(decode_record(record), fence=fence, owner=owner) for record, fence, owner in found), None)


def _boot_id() -> str:
    """The monotonic clock begins again with each boot, and the file does not."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
