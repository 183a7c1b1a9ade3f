"""The sequences of one bulk stream that come in parts, and whose predictions go out in parts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from rnnserve.v1 import sequence_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import OutputOptions
from service.api import codec
from service.api.calls import Refusals
from service.api.limits import Limits
from service.engine.recordings import Recording
from service.engine.sequence_lane import Lane
from service.engine.spilled import Progress
from service.errors import FieldInvalid, PartOverdue, ServingError, StepOutOfOrder, TooManySteps, within

PROGRESS_S = 0.25

T = TypeVar("T")
Write = Callable[[pb.PredictStreamResponse], Coroutine[Any, Any, None]]


@dataclass(eq=False)
class _Sequence:
    """One of which parts have come."""

    id: int
    begin_s: float
    told_s: float  # when the client was last told how far it is
    next_step: int = 0
    recording: Recording = field(init=False)
    overdue: asyncio.TimerHandle | None = None  # while its next part is waited for


class Parts:
    """Takes the parts of a stream one after the other; what has all of its own is computed beside them."""

    def __init__(
        self,
        bundle: Bundle,
        options: OutputOptions,
        lane: Lane,
        limits: Limits,
        refusals: Refusals,
        answered: Callable[[float], None],
        answers: asyncio.TaskGroup,
        write: Write,
    ) -> None:
        """`answered` is told how long each sequence took, `answers` wait for the ends of them."""
        self._bundle = bundle
        self._options = options
        self._last_only = not codec.wants_all_steps(options, bundle.manifest)
        self._lane = lane
        self._limits = limits
        self._refusals = refusals
        self._answered = answered
        self._answers = answers
        self._write = write
        self._reads = False
        self._incoming: dict[int, _Sequence] = {}
        self._passed_over: dict[int, None] = {}  # ids of refused ones whose last part has not come, oldest first

    async def next(self, requests: AsyncIterator[pb.PredictStreamRequest]) -> pb.PredictStreamRequest | None:
        """The next message of the stream; None = it has ended."""
        self._reads = True
        try:
            return await anext(requests, None)
        finally:
            self._reads = False

    def _expect_next(self, sequence: _Sequence) -> None:
        if limit := self._limits.part_timeout_s:
            sequence.overdue = asyncio.get_running_loop().call_later(limit, self._overdue, sequence)

    def _overdue(self, sequence: _Sequence) -> None:
        if not self._reads:  # the part may be there
            self._expect_next(sequence)
            return
        self._drop(sequence.id)
        self._pass_over(sequence.id)
        limit = self._limits.part_timeout_s
        error = PartOverdue(f"the next part did not come within {limit:g} s", field="part", limit=limit)
        self._answers.create_task(self._refuse(sequence.id, error))

    async def take(self, request: pb.PredictStreamRequest) -> None:
        """Returns once this part is stored, so that no more than one of a stream is on its way."""
        part = request.part
        if part.id in self._passed_over and part.first_step > 0:
            if part.last:
                del self._passed_over[part.id]
            return
        self._passed_over.pop(part.id, None)
        try:
            self._limits.check_size(request.ByteSize())
            if self._bundle.manifest.network.decoder is not None:
                limit = self._limits.max_sequence_steps
                message = f"an encoder-decoder takes whole sequences of up to {limit} steps, not parts of one"
                raise FieldInvalid(message, field="part", limit=limit)
            with within("part"):
                steps = self._decode(part)
            sequence = self._incoming.get(part.id) or await self._begin(part.id)
            _stop(sequence.overdue)
            await self._during(sequence, sequence.recording.store(steps), sequence.recording.progress)
            sequence.next_step += len(steps)
        except ServingError as error:
            self._drop(part.id)
            if not part.last:
                self._pass_over(part.id)
            await self._refuse(part.id, error)
            return
        if not part.last:
            self._expect_next(sequence)
        else:
            del self._incoming[part.id]
            self._answers.create_task(self._answer(sequence))

    async def end(self) -> None:
        """No more will come: what has no last part is refused."""
        incoming = list(self._incoming.values())
        self.close()  # before any refusal, for which the client may never read
        for sequence in incoming:
            message = f"the stream ended after {sequence.next_step} steps, before the last part"
            await self._refuse(sequence.id, FieldInvalid(message, field="part.last"))

    def close(self) -> None:
        """Give up what has no last part yet."""
        for number in list(self._incoming):
            self._drop(number)

    def _decode(self, part: pb.SequencePart) -> NDArray[np.generic]:
        sequence = self._incoming.get(part.id)
        expected = sequence.next_step if sequence else 0
        if part.first_step != expected:
            message = f"the part begins with step {part.first_step}, but the next one is {expected}"
            raise StepOutOfOrder(message, field="first_step", expected_step=expected)
        with within("sequence"):
            steps = codec.decode(
                part.sequence, self._bundle.manifest, max_steps=self._limits.max_sequence_steps, first_step=expected
            )
        limit = self._limits.max_recording_steps
        if expected + len(steps) > limit:
            message = f"with this part the sequence has {expected + len(steps)} steps, more than {limit}"
            raise TooManySteps(message, field="sequence", limit=limit)
        return steps

    async def _begin(self, number: int) -> _Sequence:
        """It waits for a place, unless this stream has itself others to end."""
        sequence, wait = _Sequence(number, time.monotonic(), time.monotonic()), not self._incoming

        async def begin() -> None:
            sequence.recording = await self._lane.record(self._bundle, wait=wait)
            self._incoming[number] = sequence  # at once, so that it is closed whatever happens

        await self._during(sequence, begin(), _waiting)
        return sequence

    async def _answer(self, sequence: _Sequence) -> None:
        recording, step = sequence.recording, 0
        if self._last_only and self._bundle.manifest.network.readout == "each_step":
            step = sequence.next_step - 1
        max_steps = codec.rows_of_piece(self._bundle.manifest, self._options)
        try:
            await self._during(sequence, recording.compute(), recording.progress)
            more = True
            while more:
                reading = recording.read(max_steps, last_only=self._last_only)
                outputs, more = await self._during(sequence, reading, recording.progress)
                if outputs is None:
                    continue
                response = pb.PredictStreamResponse(id=sequence.id, first_step=step, more=more)
                codec.encode_into(response.prediction, outputs, self._bundle.manifest, self._options)
                step += len(outputs)
                await self._write_in_time(response)
            self._answered(time.monotonic() - sequence.begin_s)
        except ServingError as error:
            recording.close()
            await self._refuse(sequence.id, error)
        finally:
            recording.close()

    async def _during(
        self, sequence: _Sequence, work: Coroutine[Any, Any, T], progress: Callable[[], Awaitable[Progress]]
    ) -> T:
        """What the work gives. The client is told every PROGRESS_S how far its sequence is."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                due_s = sequence.told_s + PROGRESS_S
                await asyncio.wait([task], timeout=max(0.0, due_s - time.monotonic()))
                if time.monotonic() >= due_s and not (task.done() and task.exception()):
                    await self._tell(sequence, await progress())
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _tell(self, sequence: _Sequence, progress: Progress) -> None:
        sequence.told_s = time.monotonic()
        received, computed, total = progress
        message = pb.Progress(received_steps=received, computed_steps=computed, total_steps=total)
        await self._write_in_time(pb.PredictStreamResponse(id=sequence.id, progress=message))

    async def _write_in_time(self, response: pb.PredictStreamResponse) -> None:
        """Raises PartOverdue if the client does not read; it is written all the same, for a write has no way back."""
        limit = self._limits.part_timeout_s
        writing = self._answers.create_task(self._write(response))
        await asyncio.wait([writing], timeout=limit or None)
        if not writing.done():
            raise PartOverdue(f"nothing was read within {limit:g} s", field="part", limit=limit)
        writing.result()

    def _pass_over(self, number: int) -> None:
        self._passed_over[number] = None
        if len(self._passed_over) > self._limits.max_bulk_sequences:  # of a client that ends none of what it begins
            del self._passed_over[next(iter(self._passed_over))]

    def _drop(self, number: int) -> None:
        sequence = self._incoming.pop(number, None)
        if sequence:
            _stop(sequence.overdue)
            sequence.recording.close()

    async def _refuse(self, number: int, error: ServingError) -> None:
        await self._write(pb.PredictStreamResponse(id=number, error=self._refusals.status(error)))


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()


async def _waiting() -> Progress:
    return Progress(0, 0, 0)
