"""`python -m service.worker FD`, started by the supervisor: one of several processes that serve streams."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import generate_latest

from service import logs
from service.addresses import StartError
from service.app import Service, prepare_threads, stop_on_signals
from service.catalog.catalog import CatalogError
from service.catalog.loading import Change
from service.control import Message
from service.engine.remote_lane import RemoteLane
from service.errors import unpacked
from service.member import Member, Tasks


class Worker:
    """Serves as the whole service does alone, and answers what the supervisor asks."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._channel = member.channel
        lane = RemoteLane(member.lane, max_waiting=member.settings.max_queued_sequences)
        self._service = Service(member.settings, member.catalog, owner=member.owner, lane=lane, change=self._change)
        self._tasks = Tasks()
        self._changes: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count()

    async def run(self) -> None:
        """Until SIGTERM, or the end of the supervisor. Raises StartError."""
        stop = stop_on_signals()
        listening = asyncio.create_task(self._listen())
        await self._service.run(stop, self._serving)
        self._send_metrics()
        await self._channel.flush()
        listening.cancel()

    @contextmanager
    def _serving(self, port: int) -> Iterator[None]:  # noqa: ARG002 - the supervisor knows it
        self._member.serving()
        yield

    async def _listen(self) -> None:
        while message := await self._channel.receive():
            self._heed(message)
        os._exit(1)  # the supervisor is dead, and another one may want to start in our place

    def _heed(self, message: Message) -> None:
        match message:
            case {"ask": "alive", "live_elsewhere": [int(streams), int(generations)]}:
                self._service.sessions.live_elsewhere = streams
                self._service.generations.running_elsewhere = generations
                self._channel.send(alive=True, live=[self._service.sessions.live, self._service.generations.running])
            case {"ask": "metrics"}:
                self._send_metrics()
            case {"log_level": str(level)}:
                logs.set_level(level)
            case {"dead": [*owners]}:
                self._tasks.begin(self._service.sessions.bury(owners))
            case {"change": dict(fields), "do": str(step)}:
                self._tasks.begin(self._member.take_part(self._service.loader, Change(**fields), step))
            case {"changed": int(number), "refusal": refusal}:
                self._settle(self._changes.pop(number), refusal)

    async def _change(self, change: Change) -> None:
        """In all processes of the service, or in none. Raises why one of them refused it."""
        number, changed = next(self._numbers), asyncio.get_running_loop().create_future()
        self._changes[number] = changed
        self._channel.send(make=number, change=change._asdict())
        await changed

    def _settle(self, changed: asyncio.Future[None], refusal: dict[str, Any] | None) -> None:
        if changed.cancelled():  # the caller has gone
            return
        if refusal is None:
            changed.set_result(None)
        else:
            changed.set_exception(unpacked(refusal))

    def _send_metrics(self) -> None:
        self._channel.send(metrics=generate_latest(self._service.metrics.registry).decode())


async def main() -> None:
    """Raises StartError, CatalogError."""
    member = await Member.begin()
    prepare_threads(member.settings)
    await Worker(member).run()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(main())
    except (StartError, CatalogError) as error:
        print(f"rnnserve: {error}", file=sys.stderr)
        sys.exit(2)
    logging.shutdown()
    os._exit(0)  # to unload torch takes a second that a drain does not have
