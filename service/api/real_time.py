"""RealTimeService: a stream of steps in, an answer to each message out, in order."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from google.protobuf import duration_pb2

from models.manifest import Manifest, ModelKey
from rnnserve.v1.prediction_pb2 import STEP_SELECTION_LAST, OutputOptions
from rnnserve.v1.real_time_service_pb2 import (
    NOTICE_REASON_DRAINING,
    Notice,
    OpenSession,
    ResetSession,
    SessionClosed,
    SessionOpened,
    SessionReset,
    Steps,
    StepsAnswer,
    StreamStepsRequest,
    StreamStepsResponse,
)
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceServicer
from service.api import codec
from service.api.calls import Refusals
from service.api.drain import draining
from service.api.limits import Limits
from service.catalog.catalog import Catalog
from service.errors import FieldInvalid, OpenMissing, OpenRepeated, ServingError, within
from service.sessions.registry import SessionRegistry
from service.sessions.session import Session

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[StreamStepsRequest, StreamStepsResponse]

CANCELLATION_S = 0.05  # within this after the end of a call whose client has gone, gRPC cancels it
SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RealTimeMetrics(Protocol):
    """Where answers are timed."""

    def steps_answered(self, model: ModelKey, duration_s: float) -> None:
        """A message of steps of the model was answered."""
        ...


class RealTimeService(RealTimeServiceServicer):
    """See the contract."""

    def __init__(
        self,
        catalog: Catalog,
        sessions: SessionRegistry,
        limits: Limits,
        refusals: Refusals,
        metrics: RealTimeMetrics,
    ) -> None:
        self._catalog = catalog
        self._sessions = sessions
        self._limits = limits
        self._refusals = refusals
        self._metrics = metrics
        self._streams: set[_Stream] = set()
        self._draining = False

    async def StreamSteps(  # type: ignore[override]
        self, requests: AsyncIterator[StreamStepsRequest], context: Context
    ) -> None:
        """One session, from `open` to `close`."""
        request = await anext(requests, None)
        if request is None or request.WhichOneof("request") != "open":
            raise OpenMissing("the first message of a stream must be `open`", field="open")
        if self._draining:  # the call began before the drain, but no session did
            raise draining()
        self._limits.check_size(request)
        with within("open"):
            stream = self._open(request.open, context)
        try:
            await self._serve(stream, requests)
        finally:
            self._streams.discard(stream)
            self._sessions.close(stream.session)

    async def notify_draining(self, time_left_s: float) -> None:
        """Tell every live stream that the server will end it, and open no more."""
        self._draining = True
        notice = Notice(
            reason=NOTICE_REASON_DRAINING,
            message=f"the server is shutting down; it ends this stream in {time_left_s:g} s",
            time_left=duration_pb2.Duration(seconds=int(time_left_s), nanos=int(time_left_s % 1 * 1e9)),
        )
        sending = (stream.send(StreamStepsResponse(notice=notice)) for stream in self._streams)
        await asyncio.gather(*sending, return_exceptions=True)  # a client may have gone

    def _open(self, wanted: OpenSession, context: Context) -> _Stream:
        manifest = self._catalog.find(wanted.model, wanted.version).manifest
        codec.check_options(wanted.options, manifest)
        if not SESSION_ID.fullmatch(wanted.session_id):
            raise FieldInvalid(
                "a session id has 1 to 128 characters of A-Z, a-z, 0-9, '.', '_', '-', ':'", field="session_id"
            )
        session = self._sessions.open(wanted.session_id, manifest)
        stream = _Stream(session, manifest, wanted.options, context)
        self._streams.add(stream)
        return stream

    async def _serve(self, stream: _Stream, requests: AsyncIterator[StreamStepsRequest]) -> None:
        await stream.send(StreamStepsResponse(opened=self._opened(stream)))
        async for request in requests:
            if request.WhichOneof("request") == "close":
                closed = SessionClosed(next_step=stream.session.next_step)
                await stream.send(StreamStepsResponse(closed=closed))
                return
            await stream.send(await self._reply(stream, request))
        await asyncio.sleep(CANCELLATION_S)  # ended without `close`: half-closed, or about to be cancelled

    def _opened(self, stream: _Stream) -> SessionOpened:
        return SessionOpened(
            model=stream.manifest.name,
            version=stream.manifest.version,
            next_step=stream.session.next_step,
            max_steps_per_message=self._limits.max_steps_per_message,
            max_message_bytes=self._limits.max_message_bytes,
        )

    async def _reply(self, stream: _Stream, request: StreamStepsRequest) -> StreamStepsResponse:
        try:
            self._limits.check_size(request)
            match request.WhichOneof("request"):
                case "steps":
                    with within("steps"):
                        return await self._apply(stream, request.steps)
                case "reset":
                    with within("reset"):
                        return StreamStepsResponse(reset=_reset(stream.session, request.reset))
                case "open":
                    raise OpenRepeated("this stream is open already", field="open")
                case _:
                    raise FieldInvalid("the message is empty", field="request")
        except ServingError as error:
            return StreamStepsResponse(error=self._refusals.status(error))

    async def _apply(self, stream: _Stream, steps: Steps) -> StreamStepsResponse:
        start_s = time.perf_counter()
        if not steps.HasField("first_step"):
            raise FieldInvalid("the index of the first of these steps is mandatory", field="first_step")
        inputs = codec.decode(steps, stream.manifest, max_steps=self._limits.max_steps_per_message)
        applied = await stream.session.apply(steps.first_step, inputs)
        first_step, outputs = applied.first_step, applied.outputs
        if applied.failure and not len(outputs):
            raise applied.failure
        if stream.options.steps == STEP_SELECTION_LAST:
            first_step, outputs = first_step + len(outputs) - 1, outputs[-1:]
        answer = StepsAnswer(
            first_step=first_step,
            prediction=codec.encode(outputs, stream.manifest, stream.options),
            next_step=stream.session.next_step,
            failure=self._refusals.status(applied.failure) if applied.failure else None,
        )
        self._metrics.steps_answered(stream.manifest.key, time.perf_counter() - start_s)
        return StreamStepsResponse(answer=answer)


@dataclass(eq=False)
class _Stream:
    """A live stream; answers and notices take turns to write."""

    session: Session
    manifest: Manifest
    options: OutputOptions
    context: Context

    def __post_init__(self) -> None:
        self._writing = asyncio.Lock()

    async def send(self, response: StreamStepsResponse) -> None:
        async with self._writing:
            await self.context.write(response)


def _reset(session: Session, reset: ResetSession) -> SessionReset:
    if not reset.HasField("first_step"):
        raise FieldInvalid("the index of the next step is mandatory", field="first_step")
    session.reset(reset.first_step)
    return SessionReset(next_step=session.next_step)
