"""`python -m service.lane FD SOCKET`, started by the supervisor: whole sequences of all workers, in one queue."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

from prometheus_client import generate_latest

from service.addresses import StartError
from service.app import own_lane, stop_on_signals
from service.catalog.catalog import CatalogError, load_catalog
from service.control import Channel
from service.engine.remote_lane import LaneServer
from service.metrics import Metrics
from service.settings import SettingsError, read_settings


async def main() -> None:
    """Until SIGTERM, or the end of the supervisor. Raises CatalogError."""
    descriptor, address, *arguments = sys.argv[1:]
    settings = read_settings(arguments)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname)s {os.getpid()} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    bundles = {bundle.folder: bundle for bundle in load_catalog(settings.model_repository)}
    metrics = Metrics()
    stop = stop_on_signals()
    lane = own_lane(settings, metrics)
    running = asyncio.create_task(lane.run())
    try:
        await lane.warm_up(list(bundles))
        channel = await Channel.of(socket.socket(fileno=int(descriptor)))
        async with await LaneServer(lane, bundles.__getitem__).serve(Path(address)):
            channel.send(serving=0, models="")
            await _until(stop, channel, metrics)
    finally:
        running.cancel()
        lane.close()


async def _until(stop: asyncio.Event, channel: Channel, metrics: Metrics) -> None:
    async def listen() -> None:
        while message := await channel.receive():
            if message == {"ask": "metrics"}:
                channel.send(metrics=generate_latest(metrics.registry).decode())
            elif message.get("ask") == "alive":
                channel.send(alive=True, live=0)

    ends = [asyncio.create_task(stop.wait()), asyncio.create_task(listen())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (StartError, CatalogError, SettingsError) as error:
        print(f"rnnserve: {error}", file=sys.stderr)
        sys.exit(2)
    logging.shutdown()
    os._exit(0)
