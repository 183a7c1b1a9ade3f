"""RealTimeService: a stream of steps in, an answer to each message out, in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, cast

from models.manifest import Manifest, ModelKey
from rnnserve.v1.prediction_pb2 import STEP_SELECTION_LAST, OutputOptions
from rnnserve.v1.real_time_service_pb2 import (
    DURABILITY_NONE,
    DURABILITY_PROCESS,
    DURABILITY_STORED,
    NOTICE_REASON_DRAINING,
    NOTICE_REASON_EVICTED,
    Checkpoint,
    CloseSession,
    Durability,
    Notice,
    ResetSession,
    SessionClosed,
    SessionOpened,
    SessionReset,
    Steps,
    StreamStepsRequest,
    StreamStepsResponse,
)
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceServicer
from service.api import codec
from service.api.calls import Refusals
from service.api.drain import Drain
from service.api.identities import check_session_id, check_token
from service.api.limits import Limits
from service.api.statuses import duration
from service.catalog.catalog import Catalog
from service.errors import Evicted, FieldInvalid, OpenMissing, OpenRepeated, ServingError, SessionMoved, within
from service.sessions.record import ANONYMOUS, Floats, HeldAnswer, SessionKey
from service.sessions.registry import Opening, SessionRegistry
from service.sessions.session import Session

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[StreamStepsRequest, StreamStepsResponse]

MAX_CALLER_ID_BYTES = 16
QUIET_S = 0.2  # without a message: a stream that a drain may end, since its session can be resumed
LAST_WORDS_S = 0.5
CANCELLATION_S = 0.05  # within this after the end of a call whose client has gone, gRPC cancels it


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
        drain: Drain,
    ) -> None:
        self._catalog = catalog
        self._sessions = sessions
        self._limits = limits
        self._refusals = refusals
        self._metrics = metrics
        self._drain = drain
        self._streams: set[_Stream] = set()
        self._draining = False

    async def StreamSteps(  # type: ignore[override]
        self, requests: AsyncIterator[StreamStepsRequest], context: Context
    ) -> None:
        """One stream of a session, from `open` to `close` or to whatever ends it."""
        request = await anext(requests, None)
        if request is None or request.WhichOneof("request") != "open":
            raise OpenMissing("the first message of a stream must be `open`", field="open")
        if self._draining:  # the call began before the drain, but no session did
            raise self._drain.refusal()
        self._limits.check_size(request)
        # A stream that is lost in the midst of its first write could not end with a status, were these not out.
        await context.send_initial_metadata(())
        stream = _Stream(context, cast("asyncio.Task[object]", asyncio.current_task()))
        try:
            with within("open"):
                missed = await self._open(stream, request)
            if self._draining:
                raise self._drain.refusal()
            self._streams.add(stream)
            await self._serve(stream, missed, requests)
        except asyncio.CancelledError:
            if stream.lost is None:
                raise
            stream.task.uncancel()
            await stream.say_lost()
            raise stream.lost from None
        finally:
            self._streams.discard(stream)
            if stream.is_open:
                self._sessions.leave(stream.session, stream)

    async def notify_draining(self, time_left_s: float) -> None:
        """Tell every live stream that the server will end it, end those that lose nothing, and open no more."""
        self._draining = True
        await asyncio.gather(*(self._end(stream, time_left_s) for stream in self._streams), return_exceptions=True)

    async def _end(self, stream: _Stream, time_left_s: float) -> None:
        notice = Notice(
            reason=NOTICE_REASON_DRAINING,
            message=f"the server is shutting down; it ends this stream in {time_left_s:g} s",
            time_left=duration(time_left_s),
        )
        await stream.send(StreamStepsResponse(notice=notice))
        if stream.session.resumable:
            await stream.quiet()
            stream.lose(self._drain.refusal())

    async def _open(self, stream: _Stream, request: StreamStepsRequest) -> list[HeldAnswer]:
        wanted = request.open
        manifest = self._catalog.find(wanted.model, wanted.version).manifest
        codec.check_options(wanted.options, manifest)
        check_session_id(wanted.session_id)
        if wanted.resume_token:
            check_token(wanted.resume_token)
        if len(wanted.caller_id) > MAX_CALLER_ID_BYTES:
            raise FieldInvalid(f"a caller id has at most {MAX_CALLER_ID_BYTES} bytes", field="caller_id")
        opening = Opening(
            SessionKey(ANONYMOUS, wanted.session_id),
            wanted.resume_token,
            resume=wanted.resume,
            require_durable=wanted.require_durable,
            answered_step=request.answered_step,
            version=wanted.version,
            rebuild=wanted.rebuild,
            caller_id=wanted.caller_id,
            take_over=wanted.take_over,
        )
        session, missed = await self._sessions.open(opening, manifest, stream)
        manifest = self._catalog.find(*session.model).manifest  # version 0 may mean a newer one by now
        stream.opened(session, manifest, wanted.options)
        if wanted.take_over:  # or a crash would give the session back to whoever had it before
            await self._sessions.write_now(session)
        return missed

    async def _serve(
        self, stream: _Stream, missed: list[HeldAnswer], requests: AsyncIterator[StreamStepsRequest]
    ) -> None:
        session = stream.session
        await self._sessions.may_answer()
        await stream.send(StreamStepsResponse(opened=self._opened(stream)))
        for held in missed:
            await stream.send(stream.answer(held.next_step, held.outputs))
        async for request in requests:
            stream.busy()
            session.acknowledge(request.answered_step)
            response = await self._reply(stream, request)
            await self._sessions.may_answer()
            await stream.send(response)
            if response.HasField("closed"):
                return
            stream.idle()
        await asyncio.sleep(CANCELLATION_S)  # ended without `close`: half-closed, or about to be cancelled

    def _opened(self, stream: _Stream) -> SessionOpened:
        window_s = self._sessions.resume_window_s if stream.session.resumable else 0.0
        return SessionOpened(
            model=stream.manifest.name,
            version=stream.manifest.version,
            next_step=stream.session.next_step,
            max_steps_per_message=self._limits.max_steps_per_message,
            max_message_bytes=self._limits.max_message_bytes,
            durability=self._durability(stream.session),
            resume_window=duration(window_s),
        )

    def _durability(self, session: Session) -> Durability.ValueType:
        if not session.resumable:
            return DURABILITY_NONE
        return DURABILITY_STORED if self._sessions.durable else DURABILITY_PROCESS

    async def _close(self, stream: _Stream, close: CloseSession) -> StreamStepsResponse:
        if close.HasField("first_step"):
            stream.session.expect(close.first_step)
        next_step = stream.session.next_step
        erased = await self._sessions.close(stream.session, stream)
        return StreamStepsResponse(closed=SessionClosed(next_step=next_step, erased=erased))

    async def _reply(self, stream: _Stream, request: StreamStepsRequest) -> StreamStepsResponse:
        try:
            self._limits.check_size(request)
            match request.WhichOneof("request"):
                case "steps":
                    with within("steps"):
                        return await self._apply(stream, request.steps)
                case "reset":
                    with within("reset"):
                        return StreamStepsResponse(reset=self._reset(stream.session, request.reset))
                case "close":
                    with within("close"):
                        return await self._close(stream, request.close)
                case "open":
                    raise OpenRepeated("this stream is open already", field="open")
                case _:
                    raise FieldInvalid("the message is empty", field="request")
        except SessionMoved:
            raise
        except ServingError as error:
            return StreamStepsResponse(error=self._refusals.status(error))

    async def _apply(self, stream: _Stream, steps: Steps) -> StreamStepsResponse:
        start_s = time.perf_counter()
        if not steps.HasField("first_step"):
            raise FieldInvalid("the index of the first of these steps is mandatory", field="first_step")
        inputs = codec.decode(steps, stream.manifest, max_steps=self._limits.max_steps_per_message)
        session = stream.session
        last_only = stream.options.steps == STEP_SELECTION_LAST
        before = session.next_step
        applied = await session.apply(stream, steps.first_step, inputs, last_only=last_only)
        if session.next_step != before:
            self._sessions.changed(session, session.next_step - before)
        if applied.failure and not len(applied.outputs):
            raise applied.failure
        response = stream.answer(applied.next_step, applied.outputs)
        if applied.failure:
            response.answer.failure.CopyFrom(self._refusals.status(applied.failure))
        self._metrics.steps_answered(session.model, time.perf_counter() - start_s)
        return response

    def _reset(self, session: Session, reset: ResetSession) -> SessionReset:
        if not reset.HasField("first_step"):
            raise FieldInvalid("the index of the next step is mandatory", field="first_step")
        session.reset(reset.first_step)
        self._sessions.changed(session)
        return SessionReset(next_step=session.next_step)


class _Stream:
    """A live stream, the owner of its session; answers and notices take turns to write."""

    session: Session
    manifest: Manifest
    options: OutputOptions

    def __init__(self, context: Context, task: asyncio.Task[object]) -> None:
        self.task = task
        self.lost: ServingError | None = None
        self._context = context
        self._writing = asyncio.Lock()
        self.is_open = False
        self._busy = False
        self._used = asyncio.Event()
        self._checkpoint: asyncio.Task[None] | None = None

    def opened(self, session: Session, manifest: Manifest, options: OutputOptions) -> None:
        """It has a session from now on."""
        self.session, self.manifest, self.options = session, manifest, options
        self.is_open = True

    def lose(self, error: ServingError) -> None:
        """End the call with the error; what is under way is dropped."""
        if self.lost is None:
            self.lost = error
            self.task.cancel()

    def became_durable(self) -> None:
        """Tell the client; one such message at most is under way."""
        if self.is_open and (self._checkpoint is None or self._checkpoint.done()):
            self._checkpoint = asyncio.create_task(self._send_checkpoint())

    async def say_lost(self) -> None:
        """A notice before the end, where it was the server's decision."""
        if isinstance(self.lost, Evicted) and self.is_open:
            notice = Notice(reason=NOTICE_REASON_EVICTED, message=self.lost.message)
            with suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await self.send(StreamStepsResponse(notice=notice))

    def busy(self) -> None:
        """A message is being answered."""
        self._busy = True
        self._used.set()

    def idle(self) -> None:
        """It was answered."""
        self._busy = False
        self._used.set()

    async def quiet(self) -> None:
        """Wait until nothing has come for a while."""
        while True:
            self._used.clear()
            try:
                async with asyncio.timeout(QUIET_S):
                    await self._used.wait()
            except TimeoutError:
                if not self._busy:
                    return

    def answer(self, next_step: int, outputs: Floats) -> StreamStepsResponse:
        """outputs (rows, outputs) about the steps before `next_step`."""
        response = StreamStepsResponse()
        answer = response.answer
        answer.first_step, answer.next_step = next_step - len(outputs), next_step
        if len(outputs):
            codec.encode_into(answer.prediction, outputs, self.manifest, self.options)
        return response

    async def send(self, response: StreamStepsResponse) -> None:
        if self.is_open:
            response.durable_step = self.session.durable_step
        async with self._writing:
            await self._context.write(response)

    async def _send_checkpoint(self) -> None:
        with suppress(asyncio.CancelledError):  # the client has gone
            await self.send(StreamStepsResponse(checkpoint=Checkpoint()))
