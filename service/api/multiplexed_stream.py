"""MultiplexSteps: one stream of many sessions, each bound to a handle; none waits for another.

A message is taken apart by handle. The steps of all handles that have none under way become one job of the engine;
those of the others wait for their turn. What a tick gives is answered in one message, and the steps that waited for it
become the next job.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from rnnserve.v1.real_time_service_pb2 import (
    NOTICE_REASON_DRAINING,
    CloseHandle,
    HandleClosed,
    HandleOpened,
    HandleReset,
    HandlesRefused,
    MultiplexStepsRequest,
    MultiplexStepsResponse,
    Notice,
    OpenHandle,
    ResetHandle,
    SessionClosed,
    StepBatch,
    StepBatchAnswer,
    StepsAnswer,
)
from service.api import codec
from service.api.calls import Refusals
from service.api.limits import Limits
from service.api.live_call import CANCELLATION_S, LiveCall
from service.api.openings import OpenedSession, Openings
from service.api.outbox import Outbox
from service.api.session_stream import StepMetrics
from service.api.statuses import duration
from service.api.stream_ends import CLOSED, StreamEnd, limit_met, report_end
from service.engine.step_engine import Stepped
from service.errors import (
    FieldInvalid,
    Internal,
    QueueFull,
    ServingError,
    SessionNotFound,
    StepsMissing,
    TooManySteps,
    within,
)
from service.sessions.record import Floats
from service.sessions.registry import SessionRegistry
from service.sessions.together import StepsTogether
from service.tracing import OFF, Timing, Tracing

if TYPE_CHECKING:
    from service.api.live_call import Context

log = logging.getLogger(__name__)

MAX_OPENINGS = 256  # under way at a time
RETRY_AFTER_S = 0.05  # a queue of steps is empty again by then

Step = tuple[int, NDArray[np.generic] | ServingError, float]
"""The index that the client gave, the inputs (features,) or (), or why they are refused, and when it came."""


class _Ticked(NamedTuple):
    """A tick that steps of the stream shared, by time.perf_counter."""

    model: ModelKey
    sessions: int
    came_s: float
    waited_s: float  # until it began, with the ticks of the same message before it
    computed_s: float
    ready_s: float


class _Handle:
    """What a session is bound to; its owner."""

    __slots__ = (
        "lost",
        "number",
        "opened",
        "outstanding",
        "received_bytes",
        "sent_bytes",
        "session",
        "stream",
        "waiting",
    )

    def __init__(self, stream: MultiplexedStream, number: int, received_bytes: int) -> None:
        self.stream = stream
        self.number = number
        self.received_bytes, self.sent_bytes = float(received_bytes), 0.0  # its share of messages that name several
        self.lost: ServingError | None = None
        self.outstanding = 0  # requests that are not answered
        self.waiting: list[Step | ResetHandle | CloseHandle] = []  # all but the one under way

    def bind(self, opened: OpenedSession) -> None:
        """It has a session from now on."""
        self.opened, self.session = opened, opened.session

    def lose(self, error: ServingError) -> None:
        """The session is taken away."""
        self.lost = error
        self.stream.report_end(self, error.reason, limit_met(error))
        self.stream.ended([self], error)

    def became_durable(self) -> None:
        """Tell the client, unless an answer does."""
        self.stream.became_durable(self)


class MultiplexedStream(LiveCall):
    """All handles of one call."""

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
        self._handles: dict[int, _Handle] = {}
        self._begun_s = time.perf_counter()
        self._bound = 0  # sessions that it has had
        self._half_closed = False  # by the client, once all was answered
        self._last_number = -1
        self._tasks: set[asyncio.Task[None]] = set()  # openings and closings
        self._jobs: set[StepsTogether] = set()
        self._outbox = Outbox(context, sessions.may_answer, self._progressed)
        self._progress = asyncio.Event()  # something was written, opened or closed

    @property
    def busy(self) -> bool:
        return bool(self._tasks or self._jobs or self._outbox.busy)

    @property
    def resumable(self) -> bool:
        return all(handle.session.resumable for handle in self._handles.values())

    async def serve(self, requests: AsyncIterator[MultiplexStepsRequest]) -> None:
        """Until the end of the requests, and until all of them are answered."""
        writer = asyncio.create_task(self._outbox.write())
        writer.add_done_callback(self._check)
        try:
            async for request in requests:
                self._used.set()
                self._take(request)
                while self._outbox.is_full or len(self._tasks) >= MAX_OPENINGS:
                    await self._next_progress()
            while self.busy:
                await self._next_progress()
            await asyncio.sleep(CANCELLATION_S)  # half-closed, or about to be cancelled
            self._half_closed = True
        finally:
            writer.cancel()

    def leave(self) -> None:
        for job in self._jobs:
            job.abandoned = True
        for task in self._tasks:
            task.cancel()
        handles = list(self._handles.values())
        for handle in handles:
            self._sessions.leave(handle.session, handle)
            self.report_end(handle, self.end_reason)
        reason = CLOSED if self._half_closed else self.end_reason
        more = {
            "duration_s": round(time.perf_counter() - self._begun_s, 6),
            "received_bytes": self.received_bytes,
            "sent_bytes": self._outbox.sent_bytes,
        }
        log.info(
            "multiplexed stream ended",
            extra={"reason": reason, "sessions": self._bound, **more, "request_id": self.request_id},
        )

    def report_end(self, handle: _Handle, reason: str, limit: str = "") -> None:
        """The session has this stream no more."""
        if self._handles.get(handle.number) is handle:
            sizes_bytes = round(handle.received_bytes), round(handle.sent_bytes)
            report_end(self._metrics, handle.opened, StreamEnd(reason, self.request_id, *sizes_bytes, limit=limit))

    async def announce_drain(self, time_left_s: float) -> None:
        message = f"the server is shutting down; it ends this stream in {time_left_s:g} s"
        notice = Notice(reason=NOTICE_REASON_DRAINING, message=message, time_left=duration(time_left_s))
        self._outbox.send(MultiplexStepsResponse(notice=notice))

    async def say_lost(self) -> None:
        """Nothing: what the server takes from single handles is told by `ended`, and the rest by the status."""

    def ended(self, handles: Sequence[_Handle], error: ServingError) -> None:
        """They have no session any more."""
        for handle in handles:
            self._handles.pop(handle.number, None)
            self._outbox.forget(handle)
            handle.waiting.clear()
        self._outbox.send_ended([handle.number for handle in handles], self._refusals.status(error))

    def became_durable(self, handle: _Handle) -> None:
        """Tell the client once there is nothing else to write."""
        if handle.number in self._handles:
            self._outbox.send_durable(handle)

    def _take(self, request: MultiplexStepsRequest) -> None:
        try:
            size_bytes = request.ByteSize()
            self.received_bytes += size_bytes
            self._limits.check_size(size_bytes)
            match request.WhichOneof("request"):
                case "steps":
                    with within("steps"):
                        self._take_steps(request.steps, size_bytes)
                case "open":
                    with within("open"):
                        self._open(request.open, size_bytes)
                case "reset":
                    with within("reset"):
                        self._take_other(request.reset, size_bytes)
                case "close":
                    with within("close"):
                        self._take_other(request.close, size_bytes)
                case _:
                    raise FieldInvalid("the message is empty", field="request")
        except ServingError as error:
            self._refuse(*_named(request), error)

    def _open(self, wanted: OpenHandle, size_bytes: int) -> None:
        if wanted.handle <= self._last_number:
            raise FieldInvalid(f"a handle is larger than those before, {self._last_number} too", field="handle")
        self._last_number = wanted.handle
        self._begin(self._finish_opening(_Handle(self, wanted.handle, size_bytes), wanted))

    async def _finish_opening(self, handle: _Handle, wanted: OpenHandle) -> None:
        try:
            if self.draining:
                raise self.draining
            with within("open"), within("open"):
                opened = await self._openings.open(wanted.open, wanted.answered_step, handle)
        except ServingError as error:
            self.ended([handle], error)
            return
        if handle.lost:
            return  # and the client was told
        handle.bind(opened)
        self._handles[handle.number] = handle
        self._bound += 1
        response = HandleOpened(
            handle=handle.number,
            opened=self._openings.describe(opened),
            durable_step=opened.session.durable_step,
            max_outstanding_steps=self._limits.max_outstanding_steps,
        )
        for held in opened.missed:
            opened.missed_into(response.missed.add(), held)
        handle.sent_bytes += self._outbox.send(MultiplexStepsResponse(opened=response))

    def _take_steps(self, batch: StepBatch, size_bytes: int) -> None:
        """Those of handles that have nothing under way begin, the others wait."""
        handles = self._handles_of(batch)
        bound = [handle for handle in handles if handle is not None]
        inputs, refused = self._decode(batch, bound)
        firsts, answered_steps = list(batch.first_steps), list(batch.answered_steps)
        limit, now_s, came_s = self._limits.max_outstanding_steps, time.time(), time.perf_counter()
        share_bytes = size_bytes / len(handles)
        ready: list[int] = []
        others: list[_Handle] = []
        unbound: list[int] = []
        for i, handle in enumerate(handles):
            if handle is None:
                unbound.append(i)
                continue
            handle.received_bytes += share_bytes
            session = handle.session
            session.used_s = now_s
            if answered_steps:
                session.ledger.acknowledge(answered_steps[i])
            if handle.outstanding >= limit:
                self._refuse_one(handle, firsts[i], _queue_full(limit))
                continue
            handle.outstanding += 1
            if handle.outstanding == 1 and i not in refused and firsts[i] == session.ledger.next_step:
                ready.append(i)
            else:
                handle.waiting.append((firsts[i], refused.get(i, inputs[i]), came_s))
                if handle.outstanding == 1:
                    others.append(handle)
        self._go_on(others)
        if unbound:
            error = SessionNotFound("no session is bound to the handle", field="steps.handles")
            self._refuse([batch.handles[i] for i in unbound], [firsts[i] for i in unbound], error)
        if len(ready) == len(handles):
            self._start(bound, inputs, came_s)
        elif ready:
            self._start([bound_ for i in ready if (bound_ := handles[i])], inputs[ready], came_s)

    def _handles_of(self, batch: StepBatch) -> list[_Handle | None]:
        """By their numbers. Raises StepsMissing, TooManySteps, FieldInvalid."""
        numbers, most = batch.handles, self._limits.max_steps_per_message
        count = len(numbers)
        if not count:
            raise StepsMissing("there must be at least one step", field="handles")
        if count > most:
            raise TooManySteps(f"{count} steps are more than {most}", field="handles", limit=most)
        if len(set(numbers)) < count:
            raise FieldInvalid("a handle is named twice", field="handles")
        if len(batch.first_steps) != count:
            raise FieldInvalid(f"there are {len(batch.first_steps)} for {count} handles", field="first_steps")
        if len(batch.answered_steps) not in (0, count):
            raise FieldInvalid(f"there are {len(batch.answered_steps)} for {count} handles", field="answered_steps")
        return list(map(self._handles.get, numbers))

    def _decode(self, batch: StepBatch, bound: Sequence[_Handle]) -> tuple[NDArray[np.generic], codec.Refused]:
        """The inputs of one model. Raises FieldInvalid if the handles are of several."""
        if not bound:
            return np.empty(0), {}
        if len({handle.session.model for handle in bound}) > 1:
            raise FieldInvalid("the handles have sessions of more than one model", field="handles")
        return codec.decode_batch(batch, bound[0].opened.manifest)

    def _take_other(self, request: ResetHandle | CloseHandle, size_bytes: int) -> None:
        handle = self._handles.get(request.handle)
        if handle is None:
            raise SessionNotFound("no session is bound to the handle", field="handle")
        handle.received_bytes += size_bytes
        handle.session.acknowledge(request.answered_step)
        limit = self._limits.max_outstanding_steps
        if handle.outstanding >= limit:
            raise _queue_full(limit)
        handle.outstanding += 1
        handle.waiting.append(request)
        if handle.outstanding == 1:
            self._go_on([handle])

    def _start(self, handles: Sequence[_Handle], inputs: NDArray[np.generic], came_s: float) -> None:
        """A step of each of these, of one model: inputs (handles, features) or (handles,); the first came at came_s."""

        earlier_ticks_s = 0.0

        def applied(first: int, stepped: Stepped, steps: list[int], silent: list[int]) -> None:
            nonlocal earlier_ticks_s
            if not job.left:
                self._jobs.discard(job)
                self._progressed()
            self._answer(handles[first : first + len(stepped.outputs)], stepped, steps, silent)
            waited_s, tick_s = job.waited_s + earlier_ticks_s, job.computed_s - earlier_ticks_s
            earlier_ticks_s = job.computed_s
            if steps:  # else nothing is answered
                ticked = _Ticked(job.model, len(steps), came_s, waited_s, tick_s, time.perf_counter())
                self._outbox.when_written(partial(self._measure, ticked))

        sessions = [handle.session for handle in handles]
        job = self._sessions.step_together(sessions, handles, inputs, applied, self._fail)
        self._jobs.add(job)

    def _answer(self, handles: Sequence[_Handle], stepped: Stepped, steps: list[int], silent: list[int]) -> None:
        """Say what became of a step of each; then the next ones of these handles begin.

        `steps` were applied, and the `silent` ones among them bring no answer yet.
        """
        applied = handles if len(steps) == len(handles) else [handles[i] for i in steps]
        sent_bytes = 0
        if applied:
            self._sessions.all_changed([handle.session for handle in applied])
        if silent:
            sent_bytes += self._outbox.send(_taken_from([handles[i] for i in silent]))
            steps = sorted(set(steps).difference(silent))
            applied = [handles[i] for i in steps]
        if applied:
            outputs = stepped.outputs if len(steps) == len(handles) else stepped.outputs[steps]
            for alike, rows in _by_options(applied, outputs):
                sent_bytes += self._outbox.send(_answer_of(alike, rows))
        for i, failure in stepped.failures.items():
            if not handles[i].lost:
                self._refuse_one(handles[i], handles[i].session.next_step, failure)
        waiting, share_bytes = [], sent_bytes / len(handles)
        for handle in handles:
            handle.sent_bytes += share_bytes
            handle.outstanding -= 1
            if handle.waiting:
                waiting.append(handle)
        if waiting:
            self._go_on(waiting)

    def _go_on(self, handles: Iterable[_Handle]) -> None:
        """With what waits for them, up to the next step of each; those steps begin."""
        ready, inputs, came_s = [], [], math.inf
        for handle in handles:
            if (step := self._next_step(handle)) is not None:
                ready.append(handle)
                inputs.append(step[0])
                came_s = min(came_s, step[1])
        if ready:
            self._start(ready, np.array(inputs), came_s)

    def _next_step(self, handle: _Handle) -> tuple[NDArray[np.generic], float] | None:
        """What waits is done one after the other, up to the next step to compute: its inputs, and when it came."""
        while handle.waiting:
            request = handle.waiting.pop(0)
            if isinstance(request, CloseHandle):
                self._begin(self._close(handle, request))
                return None
            if isinstance(request, ResetHandle) and handle.session.ends_with_answers(request.reset.first_step):
                self._begin(self._end_sequence(handle, request))
                return None
            try:
                if isinstance(request, ResetHandle):
                    with within("reset"):
                        self._reset(handle, request)
                else:
                    first_step, inputs, came_s = request
                    if first_step == handle.session.next_step and not isinstance(inputs, ServingError):
                        return inputs, came_s
                    with within("steps"):
                        if isinstance(inputs, ServingError):
                            raise inputs
                        self._answer_again(handle, first_step)
            except ServingError as error:
                self._refuse_one(handle, _first_step(request), error)
            handle.outstanding -= 1
        return None

    def _answer_again(self, handle: _Handle, first_step: int) -> None:
        """A step that was applied before; there is no row if its answer is not held. Raises StepOutOfOrder."""
        applied = handle.session.applied_before(first_step)
        response, opened, outputs = MultiplexStepsResponse(), handle.opened, applied.outputs
        answer = response.answer
        answer.handles.append(handle.number)
        answer.first_steps.append(applied.first_step if len(outputs) else first_step)
        answer.durable_steps.append(handle.session.durable_step)
        if len(outputs):
            codec.encode_into(answer.prediction, outputs, opened.manifest, opened.options)
        handle.sent_bytes += self._outbox.send(response)

    async def _end_sequence(self, handle: _Handle, request: ResetHandle) -> None:
        """By a reset that brings answers."""
        if handle.lost:
            return  # and the client was told
        try:
            with within("reset"):
                last = await handle.opened.end_sequence(handle, request.reset.first_step)
                self._reset(handle, request, last)
        except ServingError as error:
            if handle.lost:
                return
            self._refuse_one(handle, request.reset.first_step, error)
        handle.outstanding -= 1
        self._go_on([handle])

    def _reset(self, handle: _Handle, request: ResetHandle, last: StepsAnswer | None = None) -> None:
        if not request.reset.HasField("first_step"):
            raise FieldInvalid("the index of the next step is mandatory", field="reset.first_step")
        session = handle.session
        with within("reset"):
            session.reset(request.reset.first_step)
        self._sessions.changed(session)
        reset = HandleReset(
            handle=handle.number, next_step=session.next_step, durable_step=session.durable_step, last=last
        )
        handle.sent_bytes += self._outbox.send(MultiplexStepsResponse(reset=reset))

    async def _close(self, handle: _Handle, request: CloseHandle) -> None:
        session, close = handle.session, request.close
        if handle.lost:
            return  # and the client was told
        try:
            if close.HasField("first_step"):
                with within("close"), within("close"):
                    session.expect(close.first_step)
            last = await handle.opened.end_sequence(handle, session.next_step)
        except ServingError as error:
            if handle.lost:
                return
            self._refuse_one(handle, close.first_step, error)
            handle.outstanding -= 1
            self._go_on([handle])
            return
        next_step = session.next_step
        self.report_end(handle, CLOSED)
        del self._handles[handle.number]
        self._outbox.forget(handle)
        erased = await self._sessions.close(session, handle)
        closed = SessionClosed(next_step=next_step, erased=erased, last=last)
        self._outbox.send(MultiplexStepsResponse(closed=HandleClosed(handle=handle.number, closed=closed)))
        if handle.waiting:
            waiting = [_first_step(waiting) for waiting in handle.waiting]
            gone = SessionNotFound("the session was closed", field="steps.handles")
            self._refuse([handle.number] * len(waiting), waiting, gone)

    def _refuse_one(self, handle: _Handle, first_step: int, error: ServingError) -> None:
        self._refuse([handle.number], [first_step], error)

    def _refuse(self, numbers: Sequence[int], first_steps: Sequence[int], error: ServingError) -> None:
        bound = [self._handles.get(number) for number in numbers]
        next_steps = [0 if handle is None else handle.session.next_step for handle in bound]
        refused = HandlesRefused(
            handles=numbers, first_steps=first_steps, next_steps=next_steps, error=self._refusals.status(error)
        )
        size_bytes = self._outbox.send(MultiplexStepsResponse(refused=refused))
        for handle in filter(None, bound):
            handle.sent_bytes += size_bytes / len(bound)

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._progressed()
        self._check(task)

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("unexpected", exc_info=error)
            self._fail()

    def _fail(self) -> None:
        self.lose(Internal("an unexpected error; the server's log has it"))

    def _progressed(self) -> None:
        self._progress.set()
        self._used.set()

    async def _next_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    def _measure(self, ticked: _Ticked) -> None:
        """The answers of a tick have been written."""
        sent_s = time.perf_counter()
        self._metrics.steps_answered(ticked.model, sent_s - ticked.came_s, sent_s - ticked.ready_s)
        if self._tracing.samples_steps():
            timing = Timing(ticked.came_s, ticked.waited_s, ticked.computed_s, sent_s)
            self._tracing.steps(ticked.model, timing, sessions=ticked.sessions)


def _by_options(handles: Sequence[_Handle], outputs: Floats) -> list[tuple[Sequence[_Handle], Floats]]:
    """outputs (handles, outputs), apart for handles whose answers look different."""
    options = [id(handle.opened.options) for handle in handles]
    if len(set(options)) == 1:
        return [(handles, outputs)]
    rows = [[i for i, own in enumerate(options) if own == kind] for kind in set(options)]
    return [([handles[i] for i in alike], outputs[alike]) for alike in rows]


def _answer_of(handles: Sequence[_Handle], outputs: Floats) -> MultiplexStepsResponse:
    """That the last step of each brings: outputs (handles, outputs)."""
    sessions = [handle.session for handle in handles]
    response = MultiplexStepsResponse()
    answer = response.answer
    answer.handles.extend([handle.number for handle in handles])
    answer.first_steps.extend([session.ledger.next_answer - 1 for session in sessions])
    answer.durable_steps.extend([session.durable_step for session in sessions])
    opened = handles[0].opened
    codec.encode_into(answer.prediction, outputs, opened.manifest, opened.options)
    return response


def _taken_from(handles: Sequence[_Handle]) -> MultiplexStepsResponse:
    """The last step of each was applied, and brings no answer yet."""
    answer = StepBatchAnswer(
        handles=[handle.number for handle in handles],
        first_steps=[handle.session.next_step - 1 for handle in handles],
        durable_steps=[handle.session.durable_step for handle in handles],
    )
    return MultiplexStepsResponse(answer=answer)


def _queue_full(limit: int) -> QueueFull:
    return QueueFull(
        f"{limit} requests of the handle are not answered yet (max_outstanding_steps)",
        retry_after_s=RETRY_AFTER_S,
        limit=limit,
    )


def _first_step(request: Step | ResetHandle | CloseHandle) -> int:
    match request:
        case ResetHandle():
            return request.reset.first_step
        case CloseHandle():
            return request.close.first_step
        case first_step, *_:
            return first_step


def _named(request: MultiplexStepsRequest) -> tuple[list[int], list[int]]:
    """The handles of a request and the indices that it gives for them."""
    match request.WhichOneof("request"):
        case "steps":
            steps = request.steps
            firsts = list(steps.first_steps)
            return list(steps.handles), (firsts + [0] * len(steps.handles))[: len(steps.handles)]
        case "open":
            return [request.open.handle], [0]
        case "reset":
            return [request.reset.handle], [_first_step(request.reset)]
        case "close":
            return [request.close.handle], [_first_step(request.close)]
        case _:
            return [], []
