"""Models taken into service and out of it while others are served: in all processes of a service, or in none.

Each process first prepares a change, which may fail and changes nothing that is served. Once all have prepared it, each
commits it; if one could not, each abandons it.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import NamedTuple, Protocol

from models.bundle import Bundle, BundleError
from models.manifest import ModelKey
from service.catalog.catalog import Catalog
from service.engine.sequence_lane import Lane
from service.errors import BundleInvalid, LaneLost, ModelInUse

log = logging.getLogger(__name__)


class Change(NamedTuple):
    """Serve a model from now on, or no more; `end_streams` says that it may have live ones."""

    name: str
    version: int
    served: bool
    end_streams: bool = False

    @property
    def model(self) -> ModelKey:
        """Whose change it is."""
        return ModelKey(self.name, self.version)


class ModelUser(Protocol):
    """What a process does with the models that it serves."""

    async def add_model(self, bundle: Bundle) -> None:
        """Serve it from now on."""
        ...

    async def remove_model(self, model: ModelKey) -> None:
        """Serve it no more."""
        ...

    def streams_of(self, model: ModelKey) -> int:
        """How many live ones there are."""
        ...


class Loader:
    """The changes of one process, of which there may be one at a time."""

    def __init__(self, catalog: Catalog, lane: Lane, user: ModelUser) -> None:
        self._catalog = catalog
        self._lane = lane
        self._user = user
        self._bundle: Bundle | None = None  # prepared, and not yet served
        self._changing = asyncio.Lock()

    async def change(self, change: Change) -> None:
        """All of it, in a service of one process. Raises BundleInvalid, ModelInUse, LaneLost."""
        async with self._changing:
            await self.prepare(change)
            await self.commit(change)

    async def prepare(self, change: Change) -> None:
        """Raises BundleInvalid, ModelInUse, LaneLost."""
        self._bundle = None
        if change.served and change.model not in self._catalog:
            self._bundle = await self._loaded(change.model)
        streams = self._user.streams_of(change.model)
        if not change.served and not change.end_streams and streams:
            raise ModelInUse(f"{streams} streams of the model are live", model=change.name, streams=streams)

    async def commit(self, change: Change) -> None:
        """Take it into use."""
        if self._bundle is not None:
            await self._user.add_model(self._bundle)
            log.info("model %s/%d is served from now on", *change.model)
        elif not change.served and change.model in self._catalog:
            await self._user.remove_model(change.model)
            await self._forget(change.model)
            log.info("model %s/%d is served no more", *change.model)
        self._bundle = None

    async def abandon(self, change: Change) -> None:
        """Another process could not."""
        if self._bundle is not None:
            await self._forget(change.model)
        self._bundle = None

    async def _loaded(self, model: ModelKey) -> Bundle:
        try:
            bundle = await asyncio.to_thread(self._catalog.load, model)
            await self._lane.warm_up([bundle.folder])
        except BundleError as error:
            raise BundleInvalid(f"{error.field}: {error.problem}", model=model.name) from None
        return bundle

    async def _forget(self, model: ModelKey) -> None:
        with suppress(LaneLost):  # then it has forgotten all
            await self._lane.forget(self._catalog.folder(model))
