"""A bidirectional call, and the next one where it is to be resumed; blocking."""

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
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

Inbox = SimpleQueue[tuple[object, Any]]
"""Pairs of source and event; the source is a call or a feeder."""

_JOIN_S = 1.0
_open_calls: weakref.WeakSet["Duplex[Any, Any, Any]"] = weakref.WeakSet()


class Duplex(Generic[_X, _Q, _A]):
    """Requests go out as they are sent; whatever comes back waits in an inbox, which one thread at a time reads.

    Where the call ends, or no response comes within `timeout_s`, the bookkeeper says what now: a new call, or an error.
    """

    def __init__(self, start: Callable[[Iterator[_Q]], Any], target: str, timeout_s: float) -> None:
        self._start = start
        self._target = target
        self._timeout_s = timeout_s
        self._inbox: Inbox = SimpleQueue()
        self._feeder: _Feeder | None = None
        self._cancelled = False
        self._deadline: float | None = None  # of the next response, whoever waits for it
        self._call: _Call[_Q] = _Call(start, target, self._inbox)
        _open_calls.add(self)

    def send(self, request: _Q) -> None:
        """Does not wait."""
        self._call.send(request)

    def exchange(self, bookkeeper: Bookkeeper[_X, _Q, _A, _R], until_s: float | None = None) -> list[_R]:
        """All results of what needs no inputs, at the latest at `until_s` of the monotonic clock."""
        self.stop_feeding()
        return list(self._run(bookkeeper, None, until_s))

    def drive(self, bookkeeper: Bookkeeper[_X, _Q, _A, _R], inputs: Iterable[_X], ahead: int) -> Iterator[_R]:
        """Sends the inputs, at most `ahead` of them before their answers, and yields the results as they come.

        `inputs` is read in a thread of its own, so that no answer waits for the next input.
        """
        feeder = self._feed(inputs, ahead)
        try:
            yield from self._run(bookkeeper, feeder)
        finally:
            feeder.stop()

    def listen(self, bookkeeper: Bookkeeper[_X, _Q, _A, _R]) -> Iterator[_R]:
        """Yields the results of what needs no inputs, as they come."""
        self.stop_feeding()
        return self._run(bookkeeper, None)

    def stop_feeding(self) -> None:
        """Ends `drive`; what it has not sent of its inputs is left there."""
        if self._feeder is not None:
            self._feeder.stop()
        self._feeder = None

    def finish(self, until_s: float | None = None) -> None:
        """Sends no more and waits for the end of the call, however it ends."""
        self.stop_feeding()
        self._call.send(None)
        deadline = time.monotonic() + self._timeout_s if until_s is None else until_s
        while not self._call.over:
            self._next_event(deadline)

    def cancel(self) -> None:
        """Ends the call at once, and begins no other."""
        self._cancelled = True
        self.stop_feeding()
        self._call.cancel()

    def _run(
        self, bookkeeper: Bookkeeper[_X, _Q, _A, _R], feeder: "_Feeder | None", until_s: float | None = None
    ) -> Iterator[_R]:
        turn = bookkeeper.begin()
        while True:
            self._obey(turn)
            yield from turn.results
            if self._feeder is not feeder:
                raise RuntimeError("these steps were ended by another call on their stream")
            if feeder is not None:
                feeder.free(turn.places)
            if bookkeeper.done:
                break
            if turn.reconnect_after_s is not None or not bookkeeper.waiting:
                self._deadline = None
            if bookkeeper.waiting and self._deadline is None:
                self._deadline = time.monotonic() + self._timeout_s
            wake_s = None if turn.wake_after_s is None else time.monotonic() + turn.wake_after_s
            event = self._next_event(earliest(self._deadline, until_s), wake_s)
            if isinstance(event, Response):  # nothing else gives the server more time
                self._deadline = None
            turn = bookkeeper.handle(event)
        if bookkeeper.failure is not None:
            raise bookkeeper.failure

    def _obey(self, turn: Turn[_Q, _R]) -> None:
        if turn.reconnect_after_s is not None:
            time.sleep(turn.reconnect_after_s)
            if self._cancelled:
                raise cancelled_here()
            self._call.cancel()
            self._call = _Call(self._start, self._target, self._inbox)
        for request in turn.requests:
            self.send(request)
        for stream in turn.streams:
            self._call.send_each(stream)

    def _feed(self, inputs: Iterable[_X], ahead: int) -> "_Feeder":
        self.stop_feeding()
        self._feeder = _Feeder(inputs, ahead, self._inbox)
        return self._feeder

    def _next_event(self, deadline: float | None, wake_s: float | None = None) -> Event[_X, _A]:
        """Of the feeder or the call of now; others are late."""
        if self._call.over:  # a reconnect was interrupted
            return CallEnded(ended_by_server(self._target))
        while True:
            source, event = self._take(deadline, wake_s)
            if isinstance(event, CallEnded) and source is self._call:
                self._call.cancel()
            if source is self._call or (source is self._feeder and source is not None):
                return event  # type: ignore[no-any-return]

    def _take(self, deadline: float | None, wake_s: float | None) -> tuple[object, Any]:
        until_s = earliest(deadline, wake_s)
        try:
            return self._inbox.get(timeout=None if until_s is None else max(0.0, until_s - time.monotonic()))
        except Empty:
            if wake_s == until_s:
                return self._call, TimePassed()
            return self._call, CallEnded(timed_out(self._target, self._timeout_s))


class _Call(Generic[_Q]):
    """One call: what comes back is put into the inbox, with the call as its source."""

    def __init__(self, start: Callable[[Iterator[_Q]], Any], target: str, inbox: Inbox) -> None:
        self.over = False  # known to have ended
        self._target = target
        self._inbox = inbox
        self._requests: SimpleQueue[Iterable[_Q] | None] = SimpleQueue()  # None = no more
        self._sender: threading.Thread | None = None  # grpc's own, known once it asks for a request
        self._call = start(self._outgoing())
        self._reader = _start_thread(self._read, "rnnserve-responses")

    def send(self, request: _Q | None) -> None:
        """Does not wait."""
        self._requests.put(None if request is None else (request,))

    def send_each(self, requests: Iterator[_Q]) -> None:
        """Does not wait; they are read in the thread that sends them, each when it can be sent."""
        self._requests.put(requests)

    def cancel(self) -> None:
        """Ends it at once, and its threads.

        A thread that the exit of the interpreter stops within grpc keeps its lock, and the exit waits for it.
        """
        self.over = True
        self._requests.put(None)
        self._call.cancel()
        for thread in (self._sender, self._reader):
            if thread is not None and thread is not threading.current_thread():
                thread.join(_JOIN_S)

    def _outgoing(self) -> Iterator[_Q]:
        self._sender = threading.current_thread()
        while (requests := self._requests.get()) is not None:
            yield from requests

    def _read(self) -> None:
        error: RnnserveError = ended_by_server(self._target)
        try:
            for message in self._call:
                self._inbox.put((self, Response(message)))
        except grpc.RpcError as call_error:
            error = error_from_call(call_error, self._target)
        self._inbox.put((self, CallEnded(error)))
        self._requests.put(None)


class _Feeder:
    """Reads an iterable in a thread of its own, as long as there are places."""

    def __init__(self, inputs: Iterable[Any], places: int, inbox: Inbox) -> None:
        if places < 1:
            raise ValueError("at least one input must be allowed ahead of its answer")
        self._inputs = inputs
        self._places = threading.Semaphore(places)
        self._inbox = inbox
        self._stopped = False
        _start_thread(self._run, "rnnserve-inputs")

    def free(self, places: int) -> None:
        """So many more inputs may be read."""
        if places:
            self._places.release(places)

    def stop(self) -> None:
        """Reads no more, once the read under way is over."""
        self._stopped = True
        self._places.release()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for value in self._read():
                self._inbox.put((self, NextInput(value)))
        except BaseException as raised:
            error = raised
        self._inbox.put((self, InputsEnded(error)))

    def _read(self) -> Iterator[Any]:
        inputs = iter(self._inputs)
        while self._places.acquire() and not self._stopped:
            try:
                value = next(inputs)
            except StopIteration:
                return
            yield value


def _start_thread(run: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


@atexit.register
def _cancel_open_calls() -> None:
    for duplex in list(_open_calls):
        duplex.cancel()
