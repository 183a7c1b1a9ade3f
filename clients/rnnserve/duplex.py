"""One bidirectional call, blocking."""

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import grpc

from rnnserve.errors import RnnserveError
from rnnserve.exchange import Bookkeeper, CallEnded, Event, InputsEnded, NextInput, Response
from rnnserve.statuses import ended_by_server, error_from_call, timed_out

_X = TypeVar("_X")
_Q = TypeVar("_Q")
_A = TypeVar("_A")
_R = TypeVar("_R")

Inbox = SimpleQueue[tuple[object, Any]]
"""Pairs of source and event; the source None is the server."""

_JOIN_S = 1.0
_open_calls: weakref.WeakSet["Duplex[Any, Any, Any]"] = weakref.WeakSet()


class Duplex(Generic[_X, _Q, _A]):
    """Requests go out as they are sent; whatever comes back waits in an inbox, which one thread at a time reads.

    What waits raises TimedOut after `timeout_s`, and the reason for which the server or the connection ended the call.
    """

    def __init__(self, call: Callable[[Iterator[_Q]], Any], target: str, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._requests: SimpleQueue[_Q | None] = SimpleQueue()  # None = no more
        self._inbox: Inbox = SimpleQueue()
        self._feeder: _Feeder | None = None
        self._failure: RnnserveError | None = None
        self._sender: threading.Thread | None = None  # grpc's own, known once it asks for a request
        self._call = call(self._outgoing())
        self._reader = _start_thread(self._read, "rnnserve-responses")
        _open_calls.add(self)

    def send(self, request: _Q) -> None:
        """Does not wait."""
        self._requests.put(request)

    def receive(self) -> Event[_X, _A]:
        """The next event."""
        return self._next_event(time.monotonic() + self._timeout_s)

    def drive(self, bookkeeper: Bookkeeper[_X, _Q, _A, _R], inputs: Iterable[_X], ahead: int) -> Iterator[_R]:
        """Sends the inputs, at most `ahead` of them before their answers, and yields the results as they come.

        `inputs` is read in a thread of its own, so that no answer waits for the next input.
        """
        feeder = self._feed(inputs, ahead)
        deadline: float | None = None
        try:
            while not bookkeeper.done:
                event = self._next_event(deadline)
                turn = bookkeeper.handle(event)
                for request in turn.requests:
                    self.send(request)
                yield from turn.results
                if self._feeder is not feeder:
                    raise RuntimeError("these steps were ended by another call on their stream")
                feeder.free(turn.places)
                deadline = self._deadline_after(event, deadline) if bookkeeper.waiting else None
        finally:
            feeder.stop()
        if bookkeeper.failure is not None:
            raise bookkeeper.failure

    def stop_feeding(self) -> None:
        """Ends `drive`; what it has not sent of its inputs is left there."""
        if self._feeder is not None:
            self._feeder.stop()
        self._feeder = None

    def finish(self) -> None:
        """Sends no more and waits for the end of the call, however it ends."""
        self._requests.put(None)
        deadline = time.monotonic() + self._timeout_s
        with contextlib.suppress(RnnserveError):
            while True:
                self._next_event(deadline)
        self._join_threads()

    def cancel(self) -> None:
        """Ends the call at once."""
        self.stop_feeding()
        self._requests.put(None)
        self._call.cancel()
        self._join_threads()

    def _feed(self, inputs: Iterable[_X], ahead: int) -> "_Feeder":
        self.stop_feeding()
        self._feeder = _Feeder(inputs, ahead, self._inbox)
        return self._feeder

    def _deadline_after(self, event: Event[_X, _A], deadline: float | None) -> float:
        """Only a response gives the server more time."""
        if deadline is None or isinstance(event, Response):
            return time.monotonic() + self._timeout_s
        return deadline

    def _next_event(self, deadline: float | None) -> Event[_X, _A]:
        while True:
            if self._failure is not None:
                raise self._failure
            source, event = self._take(deadline)
            if isinstance(event, CallEnded):
                self._failure = event.error
            elif source is None or source is self._feeder:
                return event  # type: ignore[no-any-return]

    def _take(self, deadline: float | None) -> tuple[object, Any]:
        try:
            return self._inbox.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            self._failure = timed_out(self._target, self._timeout_s)
            self.cancel()
            raise self._failure from None

    def _join_threads(self) -> None:
        """A thread that the exit of the interpreter stops within grpc keeps its lock, and the exit waits for it."""
        for thread in (self._sender, self._reader):
            if thread is not None and thread is not threading.current_thread():
                thread.join(_JOIN_S)

    def _outgoing(self) -> Iterator[_Q]:
        self._sender = threading.current_thread()
        while (request := self._requests.get()) is not None:
            yield request

    def _read(self) -> None:
        error: RnnserveError = ended_by_server(self._target)
        try:
            for message in self._call:
                self._inbox.put((None, Response(message)))
        except grpc.RpcError as call_error:
            error = error_from_call(call_error, self._target)
        self._inbox.put((None, CallEnded(error)))
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
