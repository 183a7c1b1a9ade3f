"""A call under way that others may end: a drain, a takeover, an eviction."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from service.errors import Draining, ServingError

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

QUIET_S = 0.2  # without a message: a stream that a drain may end, since its sessions can be resumed
CANCELLATION_S = 0.05  # within this after the end of a call whose client has gone, gRPC cancels it


class LiveCall(ABC):
    """One stream of messages, served by the task that makes this."""

    def __init__(self, context: Context) -> None:
        self.task = cast("asyncio.Task[object]", asyncio.current_task())
        self.lost: ServingError | None = None
        self.draining: Draining | None = None
        """What whoever wants to begin something new is told once the server drains."""
        self._context = context
        self._used = asyncio.Event()

    def lose(self, error: ServingError) -> None:
        """End the call with the error; what is under way is dropped."""
        if self.lost is None:
            self.lost = error
            self.task.cancel()

    async def quiet(self) -> None:
        """Wait until nothing has come for a while, and nothing is being answered."""
        while True:
            self._used.clear()
            try:
                async with asyncio.timeout(QUIET_S):
                    await self._used.wait()
            except TimeoutError:
                if not self.busy:
                    return

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether something is being answered."""

    @property
    @abstractmethod
    def resumable(self) -> bool:
        """Whether nothing is lost with the call."""

    @abstractmethod
    async def announce_drain(self, time_left_s: float) -> None:
        """Tell the client that the server ends the call within this time."""

    @abstractmethod
    async def say_lost(self) -> None:
        """Last words before the end, where it was the server's decision."""

    @abstractmethod
    def leave(self) -> None:
        """The call is over: park what it has."""
