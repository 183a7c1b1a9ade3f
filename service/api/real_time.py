"""RealTimeService: streams of steps in, answers out; outputs written; each call from its start to whatever ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from rnnserve.v1.real_time_service_pb2 import GenerateRequest, MultiplexStepsRequest, StreamStepsRequest
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceServicer
from service.api.calls import Refusals
from service.api.drain import Drain
from service.api.generation_call import GenerationCall
from service.api.generations import GenerationMetrics, Generations
from service.api.limits import Limits
from service.api.live_call import REQUEST_ID, LiveCall
from service.api.multiplexed_stream import MultiplexedStream
from service.api.openings import Openings
from service.api.session_stream import SessionStream, StepMetrics
from service.catalog.catalog import Catalog
from service.engine.step_engine import StepEngine
from service.errors import Internal, OpenMissing, ServingError, within
from service.sessions.registry import SessionRegistry
from service.tracing import OFF, Tracing

if TYPE_CHECKING:
    from service.api.live_call import Context


class Metrics(StepMetrics, GenerationMetrics, Protocol):
    """Where all of it is counted."""


class RealTimeService(RealTimeServiceServicer):
    """See the contract."""

    def __init__(
        self,
        catalog: Catalog,
        sessions: SessionRegistry,
        engine: StepEngine,
        generations: Generations,
        limits: Limits,
        refusals: Refusals,
        metrics: Metrics,
        drain: Drain,
        tracing: Tracing = OFF,
    ) -> None:
        self._limits = limits
        self._parts = Openings(catalog, sessions, limits), sessions, limits, refusals, metrics, tracing
        self._generation_parts = catalog, engine, generations, limits, metrics
        self._drain = drain
        self._live: set[LiveCall] = set()
        self._draining = False

    async def StreamSteps(  # type: ignore[override]
        self, requests: AsyncIterator[StreamStepsRequest], context: Context
    ) -> None:
        """One stream of a session, from `open` to `close` or to whatever ends it."""
        request = await anext(requests, None)
        if request is None or request.WhichOneof("request") != "open":
            raise OpenMissing("the first message of a stream must be `open`", field="open")
        size_bytes = request.ByteSize()
        self._limits.check_size(size_bytes)
        stream = SessionStream(context, *self._parts)
        stream.received_bytes = size_bytes
        await self._run(stream, lambda: self._serve(stream, request, requests), context)

    async def MultiplexSteps(  # type: ignore[override]
        self, requests: AsyncIterator[MultiplexStepsRequest], context: Context
    ) -> None:
        """One stream of many sessions, until the client or the server ends it."""
        stream = MultiplexedStream(context, *self._parts)
        self._live.add(stream)
        await self._run(stream, lambda: stream.serve(requests), context)

    async def Generate(  # type: ignore[override]
        self, request: GenerateRequest, context: Context
    ) -> None:
        """One output, to its end."""
        call = GenerationCall(context, *self._generation_parts)
        self._live.add(call)
        await self._run(call, lambda: call.serve(request), context)

    async def notify_draining(self, time_left_s: float) -> None:
        """Tell every live stream that the server will end it, end those that lose nothing, and open no more."""
        self._draining = True
        await asyncio.gather(*(self._end(call, time_left_s) for call in self._live), return_exceptions=True)

    async def _end(self, call: LiveCall, time_left_s: float) -> None:
        call.draining = self._drain.refusal()
        await call.announce_drain(time_left_s)
        if call.resumable:
            await call.quiet()
            call.lose(self._drain.refusal())

    async def _serve(
        self, stream: SessionStream, request: StreamStepsRequest, requests: AsyncIterator[StreamStepsRequest]
    ) -> None:
        with within("open"):
            opened = await stream.open(request.open, request.answered_step)
        if self._draining:
            raise self._drain.refusal()
        self._live.add(stream)
        await stream.serve(opened, requests)

    async def _run(self, call: LiveCall, serve: Callable[[], Awaitable[None]], context: Context) -> None:
        """Serve to the end; where somebody else ends the call, its client is told why."""
        try:
            if self._draining:  # the call began before the drain, but no session did
                raise self._drain.refusal()
            # A stream that is lost in the midst of its first write could not end with a status, were these not out.
            await context.send_initial_metadata(((REQUEST_ID, call.request_id),))
            await serve()
        except asyncio.CancelledError:
            if call.lost is None:
                if self._drain.ended:
                    call.lost = self._drain.refusal()
                raise
            call.task.uncancel()
            await call.say_lost()
            raise call.lost from None
        except Exception as error:
            call.lost = error if isinstance(error, ServingError) else Internal("an unexpected error")
            raise
        finally:
            self._live.discard(call)
            call.leave()
