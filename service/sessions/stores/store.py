"""Where parked and durable sessions live: one small interface for all stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from service.sessions.record import SessionKey, SessionRecord, SessionSummary


class StoreError(Exception):
    """The store is down, full, locked or damaged. What it was asked for is either done wholly or not at all.

    Only of a scrub that fails may a part be done: nothing can be read any more, but bytes are left in the file.
    """


class RecordUnreadable(StoreError):
    """One record is damaged or of another format; the store is well, and so are the others."""


class SessionStore(Protocol):
    """Keeps records by key. Every method raises StoreError; none blocks the event loop.

    Operations take effect in the order in which they were called.
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

    async def erase(self, keys: Sequence[SessionKey], *, scrub: bool = False) -> None:
        """Forget these; with `scrub`, no byte of them is left in any file when this returns."""
        ...

    async def close(self) -> None:
        """End. What was written stays."""
        ...
