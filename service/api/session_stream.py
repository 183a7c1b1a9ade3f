"""StreamSteps: the stream of one session, an answer to each message, in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from models.manifest import ModelKey
from rnnserve.v1.prediction_pb2 import STEP_SELECTION_LAST
from rnnserve.v1.real_time_service_pb2 import (
    NOTICE_REASON_DRAINING,
    NOTICE_REASON_EVICTED,
    Checkpoint,
    CloseSession,
    Notice,
    OpenSession,
    ResetSession,
    SessionClosed,
    SessionReset,
    Steps,
    StreamStepsRequest,
    StreamStepsResponse,
)
from service.api import codec
from service.api.calls import Refusals
from service.api.limits import Limits
from service.api.live_call import CANCELLATION_S, LiveCall
from service.api.openings import OpenedSession, Openings
from service.api.statuses import duration
from service.api.stream_ends import StreamEnd, StreamMetrics, limit_met, report_end
from service.errors import Evicted, FieldInvalid, OpenRepeated, ServingError, SessionMoved, within
from service.sessions.registry import SessionRegistry
from service.tracing import OFF, Timing, Tracing

if TYPE_CHECKING:
    from service.api.live_call import Context

LAST_WORDS_S = 0.5


class StepMetrics(StreamMetrics, Protocol):
    """Where answers are timed."""

    def steps_answered(self, model: ModelKey, duration_s: float, send_s: float) -> None:
        """A message of steps of the model was answered, the end of which was to send the answer."""
        ...


class SessionStream(LiveCall):
    """A live stream, the owner of its session; answers and notices take turns to write."""

    def __init__(
        self,
        context: Context,
        openings: Openings,
        sessions: SessionRegistry,
        limits: Limits,
        refusals: Refusals,
        metrics: StepMetrics,
        tracing: Tracing = OFF,
    ) -> None:
        super().__init__(context)
        self._openings = openings
        self._sessions = sessions
        self._limits = limits
        self._refusals = refusals
        self._metrics = metrics
        self._tracing = tracing
        self._ticks_s = 0.0, 0.0  # of the last steps: the wait for ticks, and their duration
        self.opened: OpenedSession | None = None
        self.sent_bytes = 0
        self._busy = False
        self._writing = asyncio.Lock()
        self._checkpoint: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return self._busy

    @property
    def resumable(self) -> bool:
        return self.opened is not None and self.opened.session.resumable

    async def open(self, wanted: OpenSession, answered_step: int) -> OpenedSession:
        """It has a session from now on. Raises ServingError."""
        self.opened = await self._openings.open(wanted, answered_step, self)
        self._tracing.opened(wanted.session_id, self.opened.session.model)
        return self.opened

    async def serve(self, opened: OpenedSession, requests: AsyncIterator[StreamStepsRequest]) -> None:
        """Until `close`, or the end of the requests."""
        await self._sessions.may_answer()
        await self.send(StreamStepsResponse(opened=self._openings.describe(opened)))
        for held in opened.missed:
            missed = StreamStepsResponse()
            opened.missed_into(missed.answer, held)
            await self.send(missed)
        async for request in requests:
            start_s = time.perf_counter()
            self._set_busy(True)
            opened.session.acknowledge(request.answered_step)
            response = await self._reply(opened, request)
            ready_s = time.perf_counter()
            await self._sessions.may_answer()
            await self.send(response)
            if response.HasField("answer"):
                sent_s = time.perf_counter()
                self._metrics.steps_answered(opened.session.model, sent_s - start_s, sent_s - ready_s)
                if self._tracing.samples_steps():
                    steps = response.answer.next_step - request.steps.first_step
                    self._tracing.steps(opened.session.model, Timing(start_s, *self._ticks_s, sent_s), steps=steps)
            elif self.closed:
                return
            self._set_busy(False)
        await asyncio.sleep(CANCELLATION_S)  # ended without `close`: half-closed, or about to be cancelled

    def leave(self) -> None:
        if self.opened is not None:
            self._sessions.leave(self.opened.session, self)
            sizes_bytes = self.received_bytes, self.sent_bytes
            end = StreamEnd(self.end_reason, self.request_id, *sizes_bytes, limit=limit_met(self.lost))
            report_end(self._metrics, self.opened, end)

    async def announce_drain(self, time_left_s: float) -> None:
        message = f"the server is shutting down; it ends this stream in {time_left_s:g} s"
        notice = Notice(reason=NOTICE_REASON_DRAINING, message=message, time_left=duration(time_left_s))
        await self.send(StreamStepsResponse(notice=notice))

    async def say_lost(self) -> None:
        if isinstance(self.lost, Evicted) and self.opened is not None:
            notice = Notice(reason=NOTICE_REASON_EVICTED, message=self.lost.message)
            with suppress(TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await self.send(StreamStepsResponse(notice=notice))

    def became_durable(self) -> None:
        """Tell the client; one such message at most is under way."""
        if self.opened is not None and (self._checkpoint is None or self._checkpoint.done()):
            self._checkpoint = asyncio.create_task(self._send_checkpoint())

    async def send(self, response: StreamStepsResponse) -> None:
        """Write it, and how much is durable."""
        if self.opened is not None:
            response.durable_step = self.opened.session.durable_step
        async with self._writing:
            await self._context.write(response)
        self.sent_bytes += response.ByteSize()

    async def _send_checkpoint(self) -> None:
        with suppress(asyncio.CancelledError):  # the client has gone
            await self.send(StreamStepsResponse(checkpoint=Checkpoint()))

    def _set_busy(self, busy: bool) -> None:
        self._busy = busy
        self._used.set()

    async def _reply(self, opened: OpenedSession, request: StreamStepsRequest) -> StreamStepsResponse:
        try:
            size_bytes = request.ByteSize()
            self.received_bytes += size_bytes
            self._limits.check_size(size_bytes)
            match request.WhichOneof("request"):
                case "steps":
                    with within("steps"):
                        return await self._apply(opened, request.steps)
                case "reset":
                    with within("reset"):
                        return await self._reset(opened, request.reset)
                case "close":
                    with within("close"):
                        return await self._close(opened, request.close)
                case "open":
                    raise OpenRepeated("this stream is open already", field="open")
                case _:
                    raise FieldInvalid("the message is empty", field="request")
        except SessionMoved:
            raise
        except ServingError as error:
            return StreamStepsResponse(error=self._refusals.status(error))

    async def _apply(self, opened: OpenedSession, steps: Steps) -> StreamStepsResponse:
        if not steps.HasField("first_step"):
            raise FieldInvalid("the index of the first of these steps is mandatory", field="first_step")
        inputs = codec.decode(steps, opened.manifest, max_steps=self._limits.max_steps_per_message)
        session, last_only = opened.session, _last_only(opened)
        before = session.next_step
        applied = await session.apply(self, steps.first_step, inputs, last_only=last_only)
        self._ticks_s = applied.waited_s, applied.computed_s
        if session.next_step != before:
            self._sessions.changed(session, session.next_step - before)
        if applied.failure and applied.next_step == steps.first_step:
            raise applied.failure
        response = StreamStepsResponse()
        opened.answer_into(response.answer, applied)
        if applied.failure:
            response.answer.failure.CopyFrom(self._refusals.status(applied.failure))
        return response

    async def _reset(self, opened: OpenedSession, reset: ResetSession) -> StreamStepsResponse:
        if not reset.HasField("first_step"):
            raise FieldInvalid("the index of the next step is mandatory", field="first_step")
        last = await opened.end_sequence(self, reset.first_step, last_only=_last_only(opened))
        opened.session.reset(reset.first_step)
        self._sessions.changed(opened.session)
        return StreamStepsResponse(reset=SessionReset(next_step=opened.session.next_step, last=last))

    async def _close(self, opened: OpenedSession, close: CloseSession) -> StreamStepsResponse:
        session = opened.session
        if close.HasField("first_step"):
            session.expect(close.first_step)
        next_step = session.next_step
        last = await opened.end_sequence(self, next_step, last_only=_last_only(opened))
        erased = await self._sessions.close(session, self)
        self.closed = True  # even if the client goes before it has the answer
        return StreamStepsResponse(closed=SessionClosed(next_step=next_step, erased=erased, last=last))


def _last_only(opened: OpenedSession) -> bool:
    return opened.options.steps == STEP_SELECTION_LAST
