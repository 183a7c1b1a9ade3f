"""Our client's streams on a server in this process: what they say to each other is lost wherever a test wants it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from models.bundle import Bundle
from rnnserve.async_multiplex import AsyncMultiplex
from rnnserve.async_stream import AsyncStream
from rnnserve.errors import RnnserveError, Unreachable
from rnnserve.exchange import CallEnded, InputsEnded, NextInput, Response, TimePassed
from rnnserve.multiplexed import Multiplexed
from rnnserve.requests import output_options
from rnnserve.session import Session
from rnnserve.statuses import error_from_status
from service.api.calls import Refusals
from service.api.limits import Limits
from service.api.multiplexed_stream import MultiplexedStream
from service.api.openings import Openings
from service.api.session_stream import SessionStream
from service.api.statuses import status_of
from service.engine.executor import TorchExecutor
from service.engine.step_engine import StepEngine
from service.errors import ServingError
from service.metrics import Metrics
from service.sessions.registry import SessionRegistry
from tests.support.fakes import CountingMetrics, FakeStore
from tests.support.interrupted import LIMITS as SESSION_LIMITS

HANGS_S = 20.0
LIMITS = Limits(
    max_message_bytes=1_000_000,
    max_steps_per_message=100,
    max_outstanding_steps=4,
    max_sequence_steps=1,
    max_queued_sequences=1,
    max_recording_steps=1,
    part_timeout_s=0,
    max_bulk_sequences=1,
    idle_timeout_s=0,
)


@dataclass(frozen=True)
class Cut:
    """Of a call: so many responses reach the client, the next one is lost."""

    responses: int
    crash: bool = False  # the server falls back to its last checkpoint


class Server:
    """Sessions of one bundle over a durable store."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.store = FakeStore()
        self.metrics = Metrics()
        self.sessions = self._begin()

    def _begin(self) -> SessionRegistry:
        manifest = self.bundle.manifest
        executor = TorchExecutor(self.bundle.predictor)
        self.engine = StepEngine({manifest.key: executor}, max_tick_sessions=4, metrics=self.metrics)
        return SessionRegistry(
            self.engine,
            self.store,
            {manifest.key: manifest},
            SESSION_LIMITS,
            checkpoint_interval_s=1_000.0,
            checkpoint_steps=0,
            store_timeout_s=100.0,
            metrics=CountingMetrics(),
        )

    async def crash(self) -> None:
        """Nothing is left but what is in the store."""
        self.engine.close()
        self.sessions = self._begin()
        await self.sessions.start()

    async def checkpoint(self) -> None:
        await self.sessions.checkpoints.write_changed()


class Call:
    """One stream on the server; what is written waits to be read here."""

    def __init__(self, server: Server, *, is_multiplexed: bool) -> None:
        self.requests: asyncio.Queue[Any] = asyncio.Queue()
        self.responses: asyncio.Queue[Any] = asyncio.Queue()
        self._server = server
        self._task = asyncio.create_task(self._multiplex() if is_multiplexed else self._stream())

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, response: Any) -> None:
        self.responses.put_nowait(response)

    async def cancel(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    @property
    def _parts(self) -> tuple[Openings, SessionRegistry, Limits, Refusals, Metrics]:
        server = self._server
        catalog: Any = SimpleNamespace(find=lambda *_: server.bundle)
        openings = Openings(catalog, server.sessions, LIMITS)
        return openings, server.sessions, LIMITS, Refusals(server.metrics), server.metrics

    async def _requests(self) -> AsyncIterator[Any]:
        while True:
            yield await self.requests.get()

    async def _stream(self) -> None:
        context: Any = self
        stream = SessionStream(context, *self._parts)
        try:
            request = await self.requests.get()
            opened = await stream.open(request.open, request.answered_step)
            await stream.serve(opened, self._requests())
        except ServingError as error:
            self.responses.put_nowait(error_from_status(status_of(error)))
        finally:
            stream.leave()

    async def _multiplex(self) -> None:
        context: Any = self
        stream = MultiplexedStream(context, *self._parts)
        try:
            await stream.serve(self._requests())
        finally:
            stream.leave()


class Wire:
    """What a stream of our client takes for its duplex. The first calls are cut as planned, the last one is not."""

    def __init__(
        self, server: Server, cuts: Iterable[Cut], *, responses_per_checkpoint: int, is_multiplexed: bool = False
    ) -> None:
        self._server = server
        self._cuts = list(cuts)
        self._per_checkpoint = responses_per_checkpoint
        self._is_multiplexed = is_multiplexed
        self._told = 0
        self._told_in_call = 0
        self._call = self._connect()

    def _connect(self) -> Call:
        self._told_in_call = 0
        return Call(self._server, is_multiplexed=self._is_multiplexed)

    async def exchange(self, bookkeeper: Any, until_s: float | None = None) -> list[Any]:
        return [result async for result in self._run(bookkeeper, [], 0)]

    async def drive(self, bookkeeper: Any, inputs: Iterable[Any], ahead: int) -> AsyncIterator[Any]:
        """All inputs that there are places for, before any response is read."""
        async for result in self._run(bookkeeper, [*map(NextInput, inputs), InputsEnded()], ahead):
            yield result

    def stop_feeding(self) -> None: ...

    async def finish(self, until_s: float | None = None) -> None: ...

    def cancel(self) -> None: ...

    async def end(self) -> None:
        """At once."""
        await self._call.cancel()

    async def _run(self, bookkeeper: Any, events: list[Any], places: int) -> AsyncIterator[Any]:
        turn = bookkeeper.begin()
        while True:
            if turn.reconnect_after_s is not None:
                await self._call.cancel()
                self._call = self._connect()
            for request in turn.requests:
                self._call.requests.put_nowait(request)
            for result in turn.results:
                yield result
            if bookkeeper.done:
                break
            places += turn.places
            if events and places:
                places -= 1
                turn = bookkeeper.handle(events.pop(0))
            else:
                turn = bookkeeper.handle(await self._next_event(turn.wake_after_s))
        if bookkeeper.failure is not None:
            raise bookkeeper.failure

    async def _next_event(self, wake_after_s: float | None) -> Any:
        try:
            async with asyncio.timeout(HANGS_S if wake_after_s is None else wake_after_s):
                response = await self._call.responses.get()
        except TimeoutError:
            assert wake_after_s is not None, "the server says nothing"
            return TimePassed()
        if isinstance(response, RnnserveError):
            return CallEnded(response)
        if self._cuts and self._told_in_call == self._cuts[0].responses:
            await self._call.cancel()
            if self._cuts.pop(0).crash:
                await self._server.crash()
            return CallEnded(Unreachable("the server is gone", code="UNAVAILABLE"))
        self._told += 1
        self._told_in_call += 1
        if self._told % self._per_checkpoint == 0:
            await self._server.checkpoint()
        return Response(response)


def stream_on(wire: Wire, session_id: str) -> AsyncStream:
    """Of our client."""
    session = Session("random", 0, session_id, output_options("all", False, 0), open_attempts=100)
    return _on(AsyncStream(session, _never, "nowhere", HANGS_S), wire)  # type: ignore[no-any-return]


def multiplex_on(wire: Wire) -> AsyncMultiplex:
    """Of our client."""
    sessions = Multiplexed("random", 0, output_options("all", False, 0), open_attempts=100)
    return _on(AsyncMultiplex(sessions, _never, "nowhere", HANGS_S), wire)  # type: ignore[no-any-return]


def _on(stream: Any, wire: Wire) -> Any:
    stream._connect = lambda: wire
    return stream


def _never(_: object) -> None:
    raise AssertionError("nothing here goes over a network")
