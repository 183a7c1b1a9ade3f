"""What a multiplexed stream has yet to write: its responses in order, and behind them what has become durable."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from google.rpc.status_pb2 import Status

from rnnserve.v1.real_time_service_pb2 import HandlesDurable, HandlesEnded, MultiplexStepsResponse
from service.sessions.session import Session

if TYPE_CHECKING:
    from service.api.live_call import Context

MAX_UNWRITTEN = 64  # responses that wait for a client who does not read


class Reader(Protocol):
    """Who is told how much of a session is durable."""

    number: int
    session: Session
    sent_bytes: float


class Outbox:
    """Filled without waiting, and emptied by one task."""

    def __init__(
        self, context: Context, may_answer: Callable[[], Awaitable[None]], progressed: Callable[[], None]
    ) -> None:
        """`may_answer` returns once a response may be written; `progressed` is called after each one."""
        self.sent_bytes = 0
        self._context = context
        self._may_answer = may_answer
        self._progressed = progressed
        self._responses: deque[tuple[MultiplexStepsResponse, int]] = deque()  # and how many bytes each has
        self._durable: dict[Reader, None] = {}
        self._filled = asyncio.Event()
        self._writing = False
        self._sends = self._writes = 0  # responses that were to be written, and were
        self._watchers: deque[tuple[int, Callable[[], None]]] = deque()  # and how many are written by then

    @property
    def busy(self) -> bool:
        """Whether a response is not written yet."""
        return bool(self._responses or self._writing)

    @property
    def is_full(self) -> bool:
        """Nothing more should be read from a client who does not read."""
        return len(self._responses) >= MAX_UNWRITTEN

    def send(self, response: MultiplexStepsResponse) -> int:
        """In order, without waiting. How many bytes it has."""
        size_bytes = response.ByteSize()
        self._responses.append((response, size_bytes))
        self._sends += 1
        self._filled.set()
        return size_bytes

    def send_ended(self, handles: Sequence[int], error: Status) -> None:
        """These have no session any more; one message for all that end one after the other for the same reason."""
        last = self._responses[-1][0] if self._responses else None
        if last is not None and last.HasField("ended") and last.ended.error == error:
            last.ended.handles.extend(handles)
            self._responses[-1] = last, last.ByteSize()
        else:
            self.send(MultiplexStepsResponse(ended=HandlesEnded(handles=handles, error=error)))

    def send_durable(self, reader: Reader) -> None:
        """Once there is nothing else to write."""
        self._durable[reader] = None
        self._filled.set()

    def forget(self, reader: Reader) -> None:
        """It is not told any more."""
        self._durable.pop(reader, None)

    def when_written(self, watcher: Callable[[], None]) -> None:
        """Call it as soon as all that is to be written now has been."""
        self._watchers.append((self._sends, watcher))

    async def write(self) -> None:
        """For ever."""
        while True:
            await self._filled.wait()
            self._writing = True
            while self._responses or self._durable:
                self._writes += bool(self._responses)
                response, size_bytes = self._responses.popleft() if self._responses else self._durable_response()
                await self._may_answer()
                await self._context.write(response)
                self.sent_bytes += size_bytes
                while self._watchers and self._watchers[0][0] <= self._writes:
                    self._watchers.popleft()[1]()
                self._progressed()
            self._writing = False
            self._filled.clear()
            self._progressed()

    def _durable_response(self) -> tuple[MultiplexStepsResponse, int]:
        readers, self._durable = self._durable, {}
        news = {reader.number: reader.session.durable_step for reader in readers}
        response = MultiplexStepsResponse(durable=HandlesDurable(handles=news.keys(), durable_steps=news.values()))
        size_bytes = response.ByteSize()
        for reader in readers:
            reader.sent_bytes += size_bytes / len(readers)
        return response, size_bytes
