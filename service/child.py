"""A process of the service, seen from its supervisor: from its start to its end."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

from service.addresses import StartError
from service.control import Channel

START_TIMEOUT_S = 120.0
LANE = "lane"

Model: TypeAlias = tuple[str, int]
"""Its name and version."""
Change: TypeAlias = dict[str, Any]
"""The fields of one, as a worker has sent it."""
Refusal: TypeAlias = dict[str, Any] | None
"""Of a change, and why; None is no refusal."""


class Child:
    """A worker, or the lane."""

    def __init__(self, name: str, on_change: Callable[[Child, int, Change], None]) -> None:
        """`on_change` is called with the number that a change has at the worker that asks for it."""
        self.name = name
        self.owner = uuid.uuid4().hex  # of the sessions that it will have; never used again
        self.page = ""  # the last that it said of its metrics
        self.live = (0, 0)  # streams and generations
        self.models: list[Model] = []  # that it served when it began
        self.served = asyncio.Event()
        self.heard_s = time.monotonic()
        self.started_s = self.heard_s
        self.killed = False
        self._on_change = on_change
        self._paged = asyncio.Event()
        self._refusals: asyncio.Queue[Refusal] = asyncio.Queue()

    @property
    def is_lane(self) -> bool:
        return self.name == LANE

    @property
    def serves(self) -> bool:
        """Whether it has begun to, and is not dead."""
        return self.served.is_set() and self.process.returncode is None

    async def start(self, **begin: Any) -> None:
        """As a fresh interpreter, in a session of its own, so that Ctrl-C reaches us alone; then tell it the rest.

        Where this is cancelled, there is no process.
        """
        module = "service.lane" if self.is_lane else "service.worker"
        ours, theirs = socket.socketpair()
        with theirs:
            self.channel = await Channel.of(ours)
            command = [sys.executable, "-m", module, str(theirs.fileno())]
            self.process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._listening = asyncio.create_task(self._listen())
        self.channel.send(owner=self.owner, **begin)

    async def wait_until_serving(self) -> None:
        """Raises StartError if it ends before, or does not begin in time."""
        await self._unless_ended(self.served.wait(), timeout_s=START_TIMEOUT_S)
        if not self.served.is_set():
            raise StartError(f"{self.name} did not start")

    async def ask_for_metrics(self) -> None:
        """Return when they have come."""
        self._paged.clear()
        self.channel.send(ask="metrics")
        await self._paged.wait()

    async def do(self, step: str, change: Change) -> Refusal:
        """A step of a change. One that dies refuses nothing: it is started again with what is served then."""
        self.channel.send(change=change, do=step)
        refusal: Refusal = await self._unless_ended(self._refusals.get())
        return refusal

    async def ended(self) -> int:
        """Its exit code, once it is gone and all it said was heard."""
        code = await self.process.wait()
        await self._listening
        self.channel.close()
        return code

    def drain(self) -> None:
        """Let it end in its own time."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.killed = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def _unless_ended(self, waiting: Any, timeout_s: float | None = None) -> Any:
        """What is awaited, or None if the process ends before that, or the time."""
        result, ended = asyncio.ensure_future(waiting), asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait([result, ended], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            return result.result() if result.done() else None
        finally:
            result.cancel()
            ended.cancel()

    async def _listen(self) -> None:
        while message := await self.channel.receive():
            self.heard_s = time.monotonic()
            match message:
                case {"serving": True, "models": models}:
                    self.models = [(name, version) for name, version in models]
                    self.served.set()
                case {"live": [int(streams), int(generations)]}:
                    self.live = streams, generations
                case {"metrics": str(page)}:
                    self.page = page
                    self._paged.set()
                case {"make": int(number), "change": change}:
                    self._on_change(self, number, change)
                case {"refusal": refusal}:
                    self._refusals.put_nowait(refusal)
