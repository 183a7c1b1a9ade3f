"""`python -m service.lane FD`, started by the supervisor: whole sequences of all workers, in one queue."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

import uvloop
from prometheus_client import generate_latest

from models.bundle import Bundle
from models.manifest import ModelKey
from service import logs
from service.app import OBSERVE_EVERY_S, sequence_lane, stop_on_signals
from service.catalog.catalog import Catalog, CatalogError
from service.catalog.loading import Change, Loader
from service.control import Message
from service.engine.remote_lane import LaneServer
from service.engine.sequence_worker import ThreadWorker
from service.member import Member, Tasks
from service.metrics import Metrics


class LaneModels:
    """A ModelUser without streams: the catalog is all that it has."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def add_model(self, bundle: Bundle) -> None:
        self._catalog.add(bundle)

    async def remove_model(self, model: ModelKey) -> None:
        self._catalog.remove(model)

    def streams_of(self, model: ModelKey) -> int:  # noqa: ARG002
        return 0


class LaneProcess:
    """Serves the workers, and answers what the supervisor asks."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._metrics = Metrics()
        self._lane = sequence_lane(member.settings, self._metrics, ThreadWorker)
        self._loader = Loader(member.catalog, self._lane, LaneModels(member.catalog))
        self._tasks = Tasks()

    async def run(self) -> None:
        """Until SIGTERM, or the end of the supervisor."""
        stop, catalog = stop_on_signals(), self._member.catalog
        running = asyncio.create_task(self._lane.run())
        self._tasks.begin(self._observe())
        try:
            await self._lane.warm_up([bundle.folder for bundle in catalog])
            async with await LaneServer(self._lane, catalog.find).serve(self._member.lane):
                self._member.serving()
                ends = [asyncio.create_task(stop.wait()), asyncio.create_task(self._listen())]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            running.cancel()
            self._lane.close()

    async def _observe(self) -> None:
        while True:
            await asyncio.sleep(OBSERVE_EVERY_S)
            self._metrics.sequence_queue_age(self._lane.queue_age_s())

    async def _listen(self) -> None:
        while message := await self._member.channel.receive():
            self._heed(message)

    def _heed(self, message: Message) -> None:
        channel = self._member.channel
        match message:
            case {"ask": "alive"}:
                channel.send(alive=True, live=[0, 0])
            case {"ask": "metrics"}:
                channel.send(metrics=generate_latest(self._metrics.registry).decode())
            case {"log_level": str(level)}:
                logs.set_level(level)
            case {"change": dict(fields), "do": str(step)}:
                self._tasks.begin(self._member.take_part(self._loader, Change(**fields), step))


async def main() -> None:
    """Raises CatalogError."""
    member = await Member.begin()
    os.nice(member.settings.sequence_niceness)
    await LaneProcess(member).run()


if __name__ == "__main__":
    try:
        uvloop.run(main())  # unlike asyncio's, it heeds no signal once it closes
    except CatalogError as error:
        print(f"rnnserve: {error}", file=sys.stderr)
        sys.exit(2)
    logging.shutdown()
    os._exit(0)
