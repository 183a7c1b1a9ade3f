"""Work that many ask for at once and that is done for all of them together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class SharedRounds:
    """One round at a time: all that come while one runs share the next one, which goes on if they are cancelled."""

    def __init__(self, run: Callable[[], Awaitable[None]]) -> None:
        self._run = run
        self._running = asyncio.Lock()
        self._next: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> bool:
        """Whether a round runs or waits."""
        return self._next is not None or self._running.locked()

    async def run(self) -> None:
        """A round that begins after this. Raises what it raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._run_next())
            self._next.add_done_callback(retrieve)
        await asyncio.shield(self._next)

    async def _run_next(self) -> None:
        async with self._running:
            self._next = None
            await self._run()


def retrieve(task: asyncio.Future[Any]) -> None:
    """Nobody may wait for it any more; its error was told already."""
    if not task.cancelled():
        task.exception()
