"""Where parked and durable sessions live: what the store of a process that is alone can do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from service.sessions.record import SessionKey, SessionRecord, SessionSummary

CLOSE_TIMEOUT_S = 10.0


class StoreError(Exception):
    """The store is down, full, locked or damaged. What it was asked for is either done wholly or not at all.

    Only of a scrub that fails may a part be done: nothing can be read any more, but bytes are left in the file.
    """


class RecordUnreadable(StoreError):
    """One record is damaged or of another format; the store is well, and so are the others."""


class RecordStore(Protocol):
    """What stores of one owner and of several have in common; see there."""

    @property
    def durable(self) -> bool: ...
    async def write(self, records: Sequence[SessionRecord], /) -> frozenset[SessionKey] | None: ...
    async def read(self, key: SessionKey, /) -> SessionRecord | None: ...
    async def erase(self, fences: Mapping[SessionKey, int], /, *, scrub: bool = False) -> None: ...
    async def probe(self) -> None: ...
    def end_scrubs(self) -> None: ...
    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None: ...


class SessionStore(Protocol):
    """Keeps records by key, for one process. What is awaited raises StoreError; nothing blocks the event loop.

    Writes and erasures take effect in the order in which they were called. A read sees all that had ended when it was
    called, and waits for none that has not.
    """

    @property
    def durable(self) -> bool:
        """Whether what it holds survives the death of this process."""
        ...

    async def open(self) -> list[SessionSummary]:
        """Begin, and tell what is there, the longest unused first."""
        ...

    async def write(self, records: Sequence[SessionRecord]) -> None:
        """Put these in the place of what their keys had; all or none."""
        ...

    async def read(self, key: SessionKey) -> SessionRecord | None:
        """What was last written under the key. Raises RecordUnreadable, too."""
        ...

    async def erase(self, keys: Iterable[SessionKey], *, scrub: bool = False) -> None:
        """Forget these; with `scrub`, no byte of them, nor of any erased before, is left in any file then."""
        ...

    async def probe(self) -> None:
        """Write something small for good, which changes no record: it fails where a write would."""
        ...

    def end_scrubs(self) -> None:
        """Scrub no more, for time is short: one that runs fails soon, and so does each that comes."""
        ...

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End. What was written stays; what is under way fails, or is left to itself when the time is over."""
        ...
