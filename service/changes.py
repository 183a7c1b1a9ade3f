"""Changes of the models of all processes: all prepare one, then all commit it, or, if one cannot, all abandon it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from service.child import Change, Child, Model, Refusal
from service.errors import ServingError, packed


class Changes:
    """Makes them one after the other, and none while a process starts."""

    def __init__(self, serving: Callable[[], list[Child]]) -> None:
        """`serving` gives the processes that serve, the lane before the workers, which use it."""
        self.models: list[Model] | None = None  # what is served; None = all that is in the repository
        self._serving = serving
        self._turn = asyncio.Condition()
        self._starting = 0
        self._changing = False
        self._refusal: Refusal = None  # of any change, for now

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

    @asynccontextmanager
    async def refused_meanwhile(self, error: ServingError) -> AsyncIterator[None]:
        """The same for what lasts long: whoever wants a change is told so at once."""
        self._refusal = packed(error)
        await self._tell()
        try:
            async with self.none_meanwhile():
                yield
        finally:
            self._refusal = None

    async def make(self, change: Change) -> Refusal:
        """In all processes, or in none."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._refusal or not (self._changing or self._starting))
            if self._refusal:
                return self._refusal
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
