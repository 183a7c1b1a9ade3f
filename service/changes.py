"""Changes of the models of all processes: all prepare one, then all commit it, or, if one cannot, all abandon it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from service.child import Change, Child, Model, Refusal


class Changes:
    """Makes them one after the other, and none while a process starts."""

    def __init__(self, serving: Callable[[], list[Child]]) -> None:
        """`serving` gives the processes that serve, the lane before the workers, which use it."""
        self.models: list[Model] | None = None  # what is served; None = all that is in the repository
        self._serving = serving
        self._turn = asyncio.Condition()
        self._starting = 0
        self._changing = False

    @asynccontextmanager
    async def none_meanwhile(self) -> AsyncIterator[None]:
        """What starts in this block begins with what is served, and nothing of that changes until it serves."""
        async with self._turn:
            await self._turn.wait_for(lambda: not self._changing)
            self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1
            await self._tell()

    async def make(self, change: Change) -> Refusal:
        """In all processes, or in none."""
        async with self._turn:
            await self._turn.wait_for(lambda: not self._changing and not self._starting)
            self._changing = True
        try:
            return await self._make(change)
        finally:
            self._changing = False
            await self._tell()

    async def _tell(self) -> None:
        async with self._turn:
            self._turn.notify_all()

    async def _make(self, change: Change) -> Refusal:
        children = self._serving()
        refusals = await asyncio.gather(*(child.do("prepare", change) for child in children))
        refusal = next(filter(None, refusals), None)
        for child in children if change["served"] else reversed(children):
            await child.do("abandon" if refusal else "commit", change)
        if refusal is None:
            self._note(change)
        return refusal

    def _note(self, change: Change) -> None:
        model = (change["name"], change["version"])
        others = [other for other in self.models or [] if other != model]
        self.models = [*others, model] if change["served"] else others
