"""`python -m service.worker FD OWNER LANE`, started by the supervisor: one of several processes that serve streams."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from prometheus_client import generate_latest

from service.addresses import StartError
from service.app import Service, stop_on_signals
from service.catalog.catalog import CatalogError, load_catalog
from service.control import Channel, Message
from service.engine.remote_lane import RemoteLane
from service.settings import Settings, SettingsError, read_settings


class Worker:
    """Serves as the whole service does alone, and answers what the supervisor asks."""

    def __init__(self, settings: Settings, channel: Channel, owner: str, lane: Path) -> None:
        catalog = load_catalog(settings.model_repository)
        self._channel = channel
        self._service = Service(settings, catalog, RemoteLane(lane), owner)
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until SIGTERM, or the end of the supervisor. Raises StartError."""
        stop = stop_on_signals()
        listening = asyncio.create_task(self._listen())
        await self._service.run(stop, self._serving)
        self._send_metrics()
        await self._channel.flush()
        listening.cancel()

    @contextmanager
    def _serving(self, port: int) -> Iterator[None]:
        self._channel.send(serving=port, models=self._service.model_names())
        yield

    async def _listen(self) -> None:
        while message := await self._channel.receive():
            self._heed(message)
        os._exit(1)  # the supervisor is dead, and another one may want to start in our place

    def _heed(self, message: Message) -> None:
        match message:
            case {"ask": "alive", "live_elsewhere": int(streams)}:
                self._service.sessions.live_elsewhere = streams
                self._channel.send(alive=True, live=self._service.sessions.live)
            case {"ask": "metrics"}:
                self._send_metrics()
            case {"dead": [*owners]}:
                call = asyncio.create_task(self._service.sessions.bury(owners))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    def _send_metrics(self) -> None:
        self._channel.send(metrics=generate_latest(self._service.metrics.registry).decode())


async def main() -> None:
    """Raises StartError, CatalogError."""
    descriptor, owner, lane, *arguments = sys.argv[1:]
    settings = read_settings(arguments)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname)s {os.getpid()} %(name)s: %(message)s",
        stream=sys.stderr,
    )
    torch.set_num_threads(settings.step_threads)
    channel = await Channel.of(socket.socket(fileno=int(descriptor)))
    await Worker(settings, channel, owner, Path(lane)).run()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(main())
    except (StartError, CatalogError, SettingsError) as error:
        print(f"rnnserve: {error}", file=sys.stderr)
        sys.exit(2)
    logging.shutdown()
    os._exit(0)  # to unload torch takes a second that a drain does not have
