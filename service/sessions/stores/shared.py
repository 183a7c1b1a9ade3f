"""A store that several processes use at once: each session has one owner at a time."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.manifest import ModelKey
from service.sessions.record import SessionKey, SessionRecord, SessionSummary
from service.sessions.stores.store import CLOSE_TIMEOUT_S


def first_fence() -> int:
    """Of a new session; random, for others may begin one of the same id. Exact as a float, too."""
    return secrets.randbits(48)


@dataclass(frozen=True, slots=True)
class StoredSession:
    """What is known of a session without reading it, and who has it."""

    summary: SessionSummary
    fence: int
    owner: str  # "" = it is parked
    owner_lives: bool  # its lease has not run out


@dataclass(frozen=True, slots=True)
class Totals:
    """Of sessions, and of their states and answers."""

    sessions: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody asks the owner of a session to let go of it; for good if it is deleted."""

    key: SessionKey
    deleted: bool


class SharedStore(Protocol):
    """Keeps records by key for several owners. An owner is a process, with a name that is never used again.

    Each record has a fence, a number that changes whenever the session changes hands; whoever has another one than the
    store can change nothing (fencing tokens, as in Kleppmann, "How to do distributed locking", 2016). An owner lives as
    long as its lease, by the clock of the store.

    Every method that is awaited raises StoreError; none blocks the event loop. Writes, erasures and takes of one owner
    take effect in the order in which they were called.
    """

    durable: bool  # True

    async def open(self, owner: str, on_wanted: Callable[[Wanted], None]) -> None:
        """Begin, as this owner, who is told in the event loop what others want of it."""
        ...

    async def renew(self, lease_s: float) -> bool:
        """This owner lives for so long from now on. Whether it had lived until now; at first it had not."""
        ...

    async def bury(self, owners: Iterable[str]) -> None:
        """These have died for certain: their leases end now."""
        ...

    async def write(self, records: Sequence[SessionRecord]) -> frozenset[SessionKey]:
        """Put each in the place of what its key had, if that has the same fence, or where nothing is, if it is new.

        The keys of the others, of which nothing has changed. `record.owner` is written, too.
        """
        ...

    async def read(self, key: SessionKey) -> SessionRecord | None:
        """What was last written under the key, with fence and owner of now. Raises RecordUnreadable, too."""
        ...

    async def take(self, key: SessionKey, fence: int) -> SessionRecord | None:
        """The session for this owner, with the next fence.

        None, and nothing changes, if its fence is another one by now, or another owner has it and lives. Raises
        RecordUnreadable, too.
        """
        ...

    async def erase(self, fences: Mapping[SessionKey, int], *, scrub: bool = False) -> None:
        """Forget those that have these fences still; with `scrub`, no byte of them is left in any file then."""
        ...

    async def want(self, owner: str, wanted: Wanted) -> None:
        """Tell that owner. Whoever is not there hears nothing."""
        ...

    async def find(self, key: SessionKey) -> StoredSession | None:
        """What is known of the session."""
        ...

    async def after(self, key: SessionKey, sessions: int) -> list[StoredSession]:
        """So many of the key's tenant at most, by id, behind that key."""
        ...

    async def totals(self, tenant: str | None = None) -> Totals:
        """Of all sessions, or the tenant's."""
        ...

    async def longest_parked(
        self, sessions: int, *, tenant: str | None = None, used_before_s: float | None = None
    ) -> list[StoredSession]:
        """So many at most that no owner who lives has, the longest unused first."""
        ...

    async def parked_totals(self) -> dict[ModelKey, Totals]:
        """Of the sessions that no owner has, by model; those of dead owners may be left out."""
        ...

    async def probe(self) -> None:
        """Write something small for good, which changes no record: it fails where a write would."""
        ...

    def end_scrubs(self) -> None:
        """Scrub no more, for time is short: one that runs fails soon, and so does each that comes."""
        ...

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End; the lease is given up. What was written stays; what is under way fails, or is left to itself."""
        ...
