"""A call under way that others may end: a drain, a takeover, an eviction."""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from service.api.stream_ends import CLIENT_GONE, CLOSED
from service.errors import Draining, ServingError

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

QUIET_S = 0.2  # without a message: a stream that a drain may end, since its sessions can be resumed
REQUEST_ID, MAX_REQUEST_ID = "x-request-id", 128
"""The metadata by which a client may name its call, for the logs of both; and how many characters that may have."""
CANCELLATION_S = 0.05  # within this after the end of a call whose client has gone, gRPC cancels it


def request_id_of(context: Context) -> str:
    """What the client calls it, or a random name."""
    given = dict(context.invocation_metadata() or ()).get(REQUEST_ID)
    fits = isinstance(given, str) and given.isprintable() and 0 < len(given) <= MAX_REQUEST_ID
    return str(given) if fits else uuid.uuid4().hex


class LiveCall(ABC):
    """One stream of messages, served by the task that makes this."""

    def __init__(self, context: Context) -> None:
        self.task = cast("asyncio.Task[object]", asyncio.current_task())
        self.lost: ServingError | None = None
        self.draining: Draining | None = None
        """What whoever wants to begin something new is told once the server drains."""
        self.closed = False  # by the client, in so many words
        self.request_id = request_id_of(context)
        self.received_bytes = 0
        self._context = context
        self._used = asyncio.Event()

    @property
    def end_reason(self) -> str:
        """Why the call is over."""
        if self.lost is not None:
            return self.lost.reason
        return CLOSED if self.closed else CLIENT_GONE

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
