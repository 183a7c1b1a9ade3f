"""A bidirectional call, and the next one where it is to be resumed; on an event loop."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Any, Generic, TypeVar

import grpc

from rnnserve.errors import RnnserveError
from rnnserve.exchange import (
    Bookkeeper,
    CallEnded,
    Event,
    InputsEnded,
    NextInput,
    Response,
    TimePassed,
    Turn,
    earliest,
)
from rnnserve.statuses import cancelled_here, ended_by_server, error_from_call, timed_out

_X = TypeVar("_X")
_Q = TypeVar("_Q")
_A = TypeVar("_A")
_R = TypeVar("_R")

Inbox = asyncio.Queue[tuple[object, Any]]
"""Pairs of source and event; the source is a call or a feeder."""

_WRITE_FAILED = "Internal error from Core"


class AsyncDuplex(Generic[_X, _Q, _A]):
    """Requests go out as they are sent; whatever comes back waits in an inbox, which one task at a time reads.

    Where the call ends, or no response comes within `timeout_s`, the bookkeeper says what now: a new call, or an error.
    """

    def __init__(self, start: Callable[[AsyncIterator[_Q]], Any], target: str, timeout_s: float) -> None:
        self._start = start
        self._target = target
        self._timeout_s = timeout_s
        self._inbox: Inbox = asyncio.Queue()
        self._feeder: _Feeder | None = None
        self._cancelled = False
        self._deadline: float | None = None  # of the next response, whoever waits for it
        self._call: _Call[_Q] = _Call(start, target, self._inbox)

    def send(self, request: _Q) -> None:
        """Does not wait."""
        self._call.send(request)

    async def exchange(self, bookkeeper: Bookkeeper[_X, _Q, _A, _R], until_s: float | None = None) -> list[_R]:
        """All results of what needs no inputs, at the latest at `until_s` of the loop's clock."""
        self.stop_feeding()
        return [result async for result in self._run(bookkeeper, None, until_s)]

    async def drive(
        self, bookkeeper: Bookkeeper[_X, _Q, _A, _R], inputs: Iterable[_X] | AsyncIterable[_X], ahead: int
    ) -> AsyncGenerator[_R]:
        """Sends the inputs, at most `ahead` of them before their answers, and yields the results as they come.

        `inputs` is read in a task of its own, so that no answer waits for the next input.
        """
        feeder = self._feed(inputs, ahead)
        try:
            async with contextlib.aclosing(self._run(bookkeeper, feeder)) as results:
                async for result in results:
                    yield result
        finally:
            feeder.stop()

    def listen(self, bookkeeper: Bookkeeper[_X, _Q, _A, _R]) -> AsyncGenerator[_R]:
        """Yields the results of what needs no inputs, as they come."""
        self.stop_feeding()
        return self._run(bookkeeper, None)

    def stop_feeding(self) -> None:
        """Ends `drive`; what it has not sent of its inputs is left there."""
        if self._feeder is not None:
            self._feeder.stop()
        self._feeder = None

    async def finish(self, until_s: float | None = None) -> None:
        """Sends no more and waits for the end of the call, however it ends."""
        self.stop_feeding()
        self._call.send(None)
        deadline = _now_s() + self._timeout_s if until_s is None else until_s
        while not self._call.over:
            await self._next_event(deadline)

    def cancel(self) -> None:
        """Ends the call at once, and begins no other."""
        self._cancelled = True
        self.stop_feeding()
        self._call.cancel()

    async def _run(
        self, bookkeeper: Bookkeeper[_X, _Q, _A, _R], feeder: "_Feeder | None", until_s: float | None = None
    ) -> AsyncGenerator[_R]:
        turn = bookkeeper.begin()
        while True:
            await self._obey(turn)
            for result in turn.results:
                yield result
            if self._feeder is not feeder:
                raise RuntimeError("these steps were ended by another call on their stream")
            if feeder is not None:
                feeder.free(turn.places)
            if bookkeeper.done:
                break
            if turn.reconnect_after_s is not None or not bookkeeper.waiting:
                self._deadline = None
            if bookkeeper.waiting and self._deadline is None:
                self._deadline = _now_s() + self._timeout_s
            wake_s = None if turn.wake_after_s is None else _now_s() + turn.wake_after_s
            event = await self._next_event(earliest(self._deadline, until_s), wake_s)
            if isinstance(event, Response):  # nothing else gives the server more time
                self._deadline = None
            turn = bookkeeper.handle(event)
        if bookkeeper.failure is not None:
            raise bookkeeper.failure

    async def _obey(self, turn: Turn[_Q, _R]) -> None:
        if turn.reconnect_after_s is not None:
            await asyncio.sleep(turn.reconnect_after_s)
            if self._cancelled:
                raise cancelled_here()
            self._call.cancel()
            self._call = _Call(self._start, self._target, self._inbox)
        for request in turn.requests:
            self.send(request)
        for stream in turn.streams:
            self._call.send_each(stream)

    def _feed(self, inputs: Iterable[_X] | AsyncIterable[_X], ahead: int) -> "_Feeder":
        self.stop_feeding()
        self._feeder = _Feeder(inputs, ahead, self._inbox)
        return self._feeder

    async def _next_event(self, deadline: float | None, wake_s: float | None = None) -> Event[_X, _A]:
        """Of the feeder or the call of now; others are late."""
        if self._call.over:  # a reconnect was interrupted
            return CallEnded(ended_by_server(self._target))
        while True:
            source, event = await self._take(deadline, wake_s)
            if isinstance(event, CallEnded) and source is self._call:
                self._call.cancel()
            if source is self._call or (source is self._feeder and source is not None):
                return event  # type: ignore[no-any-return]

    async def _take(self, deadline: float | None, wake_s: float | None) -> tuple[object, Any]:
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        until_s = earliest(deadline, wake_s)
        try:
            async with asyncio.timeout_at(until_s):
                return await self._inbox.get()
        except TimeoutError:
            if wake_s == until_s:
                return self._call, TimePassed()
            return self._call, CallEnded(timed_out(self._target, self._timeout_s))


class _Call(Generic[_Q]):
    """One call: what comes back is put into the inbox, with the call as its source."""

    def __init__(self, start: Callable[[AsyncIterator[_Q]], Any], target: str, inbox: Inbox) -> None:
        self.over = False  # known to have ended
        self._target = target
        self._inbox = inbox
        self._requests: asyncio.Queue[Iterable[_Q] | None] = asyncio.Queue()  # None = no more
        self._status: grpc.aio.AioRpcError
        self._call = start(self._outgoing())
        self._call.add_done_callback(self._keep_status)
        self._reading = asyncio.create_task(self._read(), name="rnnserve-responses")

    def send(self, request: _Q | None) -> None:
        """Does not wait."""
        self._requests.put_nowait(None if request is None else (request,))

    def send_each(self, requests: Iterator[_Q]) -> None:
        """Does not wait; each is read when it can be sent."""
        self._requests.put_nowait(requests)

    def cancel(self) -> None:
        """Ends it at once."""
        self.over = True
        self._requests.put_nowait(None)
        self._call.cancel()

    async def _outgoing(self) -> AsyncIterator[_Q]:
        while (requests := await self._requests.get()) is not None:
            for request in requests:
                yield request

    async def _read(self) -> None:
        error: RnnserveError = ended_by_server(self._target)
        try:
            async for message in self._call:
                self._inbox.put_nowait((self, Response(message)))
        except grpc.RpcError:
            error = error_from_call(await self._final_status(), self._target)
        except asyncio.CancelledError:  # how grpc.aio reports that the call was cancelled here
            error = cancelled_here()
        self._inbox.put_nowait((self, CallEnded(error)))
        self._requests.put_nowait(None)

    async def _final_status(self) -> grpc.aio.AioRpcError:
        """Why the call ended.

        Where it ended while a request was being written, grpc.aio sets a status of its own as well: before the one that
        the server sent or, overwriting that, behind it.
        """
        for _ in range(100):
            if self._status.details() != _WRITE_FAILED:
                break
            await asyncio.sleep(0.01)
            self._keep_status(self._call)
        return self._status

    def _keep_status(self, call: Any) -> None:
        """Runs at once when the call has ended, so that none of these waits."""
        code, details, trailers = _at_once(call.code()), _at_once(call.details()), _at_once(call.trailing_metadata())
        self._status = grpc.aio.AioRpcError(code, trailing_metadata=trailers, details=details)


class _Feeder:
    """Reads an iterable in a task of its own, as long as there are places."""

    def __init__(self, inputs: Iterable[Any] | AsyncIterable[Any], places: int, inbox: Inbox) -> None:
        if places < 1:
            raise ValueError("at least one input must be allowed ahead of its answer")
        self._inputs = inputs
        self._places = asyncio.Semaphore(places)
        self._inbox = inbox
        self._task = asyncio.create_task(self._run(), name="rnnserve-inputs")

    def free(self, places: int) -> None:
        """So many more inputs may be read."""
        for _ in range(places):
            self._places.release()

    def stop(self) -> None:
        """Reads no more."""
        self._task.cancel()

    async def _run(self) -> None:
        error: BaseException | None = None
        try:
            inputs = as_async(self._inputs)
            while await self._places.acquire():
                self._inbox.put_nowait((self, NextInput(await anext(inputs))))
        except StopAsyncIteration:
            pass
        except Exception as raised:
            error = raised
        self._inbox.put_nowait((self, InputsEnded(error)))


def as_async(inputs: Iterable[_X] | AsyncIterable[_X]) -> AsyncIterator[_X]:
    """One iterator for both."""
    return aiter(inputs) if isinstance(inputs, AsyncIterable) else _each(inputs)


async def _each(inputs: Iterable[_X]) -> AsyncIterator[_X]:
    for value in inputs:
        yield value


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _at_once(coroutine: Coroutine[Any, Any, _R]) -> _R:
    """The result of a coroutine that does not wait."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: _R = end.value
        return result
    raise RuntimeError("the coroutine waits")
