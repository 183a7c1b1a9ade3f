"""What the store has yet to forget."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from service.errors import StoreUnavailable
from service.sessions.checkpoints import Checkpointer
from service.sessions.record import SessionKey
from service.sessions.rounds import SharedRounds

SCRUB_AGAIN_S = 30.0  # one that fails late has held writes up for seconds


@dataclass(frozen=True, eq=False)
class _Mark:
    """Each key has its own, for a session of that id may begin and end while an older one is erased."""

    fence: int = 0


class Erasure:
    """Keys of sessions that are over. None is dropped before the store has done with it, whatever is raised."""

    def __init__(self, checkpoints: Checkpointer, clock: Callable[[], float]) -> None:
        self._checkpoints = checkpoints
        self._clock = clock
        self._ended: dict[SessionKey, _Mark] = {}
        self._deleted: dict[SessionKey, _Mark] = {}  # bytes of these may be left in a file, erased or not
        self._erase = SharedRounds(self._erase_ended)
        self._scrub = SharedRounds(self._scrub_deleted)
        self._scrubbed_s = 0.0

    def add(self, key: SessionKey, fence: int) -> None:
        """The session is over; whoever has taken it meanwhile has another fence, and keeps it."""
        self._ended[key] = _Mark(fence)

    def replaced(self, key: SessionKey) -> None:
        """Another session has the id, and what is written of it takes the place of what was there."""
        self._ended.pop(key, None)

    def owes(self, key: SessionKey) -> bool:
        """Whether the session is over, but the store may still have it."""
        return key in self._ended

    def owes_scrub(self, key: SessionKey) -> bool:
        """Whether the session was deleted, but its bytes may still be in a file."""
        return key in self._deleted

    async def erase(self) -> None:
        """Forget what is over; where the store does not answer, later."""
        if self._ended:
            with suppress(StoreUnavailable):
                await self._erase.run()

    async def confirm(self, key: SessionKey) -> None:
        """Return once the store has forgotten the session, if it was closed. Raises StoreUnavailable."""
        if key in self._ended and key not in self._deleted:  # for which somebody waits, for seconds
            await self._erase.run()

    async def scrub(self, key: SessionKey) -> None:
        """Leave no byte of the session in any file. Raises StoreUnavailable; then it is tried again, later."""
        self._deleted[key] = _Mark()
        await self._scrub.run()

    async def scrub_again(self) -> None:
        """Scrub what could not be scrubbed, if the store can be written and the last time is a while ago."""
        due = self._clock() - self._scrubbed_s >= SCRUB_AGAIN_S
        if self._deleted and self._checkpoints.available and due and not self._scrub.under_way:
            with suppress(StoreUnavailable):
                await self._scrub.run()

    async def _erase_ended(self) -> None:
        ended = dict(self._ended)
        await self._checkpoints.erase(_fences(ended))
        _drop(self._ended, ended)

    async def _scrub_deleted(self) -> None:
        ended, deleted = dict(self._ended), dict(self._deleted)
        try:
            await self._checkpoints.scrub(_fences(ended))
        finally:
            self._scrubbed_s = self._clock()
        _drop(self._ended, ended)
        _drop(self._deleted, deleted)


def _fences(ended: dict[SessionKey, _Mark]) -> dict[SessionKey, int]:
    return {key: mark.fence for key, mark in ended.items()}


def _drop(waiting: dict[SessionKey, _Mark], done: dict[SessionKey, _Mark]) -> None:
    for key, mark in done.items():
        if waiting.get(key) is mark:
            del waiting[key]
