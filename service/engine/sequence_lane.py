"""The lane for whole sequences, which are computed where they never hold up a live step.

Sequences wait in a bounded queue until there is memory for them, then share ticks with those that are there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.beam import Decoding, Hypothesis
from models.bundle import Bundle
from models.manifest import ModelKey
from service.engine.executor import Floats
from service.engine.lane_refusals import full, lost
from service.engine.recordings import Recording, RecordingMetrics, Recordings
from service.engine.sequence_engine import Answer, Ended
from service.engine.sequence_worker import (
    Abandon,
    Begin,
    Forget,
    Load,
    News,
    Obeyed,
    Order,
    SetLogLevel,
    Ticked,
    Worker,
)
from service.engine.spilled import Told
from service.errors import ExecutionFailed, ServingError

log = logging.getLogger(__name__)

LOOK_AHEAD = 64  # sequences in the queue, for one that is short enough
SHORT_SHARE, KEPT_SHARE = 256, 8
"""A sequence is short if it takes this part of the memory or less; and of that, this part is kept for short ones."""


class LaneMetrics(RecordingMetrics, Protocol):
    """Where whole sequences are counted."""

    def queued(self, sequences: int) -> None:
        """So many wait or run now."""
        ...

    def sequence_begun(self, model: ModelKey, queued_s: float) -> None:
        """One is computed from now on, and has waited so long."""
        ...

    def sequence_abandoned(self, model: ModelKey) -> None:
        """Nobody wants one any more that was being computed."""
        ...

    def lane_died(self) -> None:
        """The process that computes them has died, and another is begun."""
        ...

    def batch(self, model: ModelKey, sequences: int, duration_s: float, steps: int, padding: int) -> None:
        """So many shared a tick, in which so many steps were computed, some of them behind an end."""
        ...


class Lane(Protocol):
    """Runs whole sequences, in this service's own process for them or in that of all workers."""

    available: bool
    """Whether there is such a process now."""
    available_changed: asyncio.Event

    def queue_age_s(self) -> float:
        """How long the first of those has waited that do not run yet, as far as it is known here."""
        ...

    async def warm_up(self, folders: list[Path]) -> None:
        """Load the bundles of these folders, so that the first request need not wait. Raises BundleError, LaneLost."""
        ...

    async def forget(self, folder: Path) -> None:
        """The bundle of this folder is used no more. Raises LaneLost."""
        ...

    async def predict(self, bundle: Bundle, sequences: list[NDArray[np.generic]], *, wait: bool) -> list[Floats]:
        """Each (steps, features) or (steps,) -> for each (steps, outputs), or (1, outputs) about the whole of it.

        Where the queue has no room, waits or raises QueueFull. Also raises ExecutionFailed, and LaneLost if the
        process died.
        """
        ...

    async def decode(
        self, bundle: Bundle, sequences: list[NDArray[np.generic]], decoding: Decoding, *, wait: bool
    ) -> list[list[Hypothesis]]:
        """The same through an encoder-decoder: for each its hypotheses, the best first."""
        ...

    async def record(self, bundle: Bundle, *, wait: bool) -> Recording:
        """One that comes in parts; to be closed. Where there are as many as may be, waits or raises QueueFull.

        Also raises LaneLost, DiskFull, ExecutionFailed.
        """
        ...

    def set_log_level(self, level: str) -> None:
        """Of the process that computes, if it is this service's own."""
        ...

    async def run(self) -> None:
        """Until cancelled."""
        ...

    def close(self) -> None:
        """At once, whatever it computes."""
        ...


@dataclass(eq=False)
class _Job:
    bundle: Bundle
    sequence: NDArray[np.generic]
    decoding: Decoding | None
    is_short: bool
    result: asyncio.Future[Any]
    queued_s: float = field(default_factory=time.perf_counter)

    @property
    def steps(self) -> int:
        return len(self.sequence) + self.bundle.manifest.look_ahead


class SequenceLane:
    """Queues whole sequences, and sends its worker as many as there is memory for."""

    def __init__(
        self,
        begin_worker: Callable[[], Worker],
        *,
        max_queued: int,
        max_batch_steps: int,
        max_recordings: int,
        metrics: LaneMetrics,
    ) -> None:
        """`begin_worker` begins what computes them; again if that dies."""
        self._begin_worker = begin_worker
        self._max_queued = max_queued
        self._max_batch_steps = max_batch_steps
        self._metrics = metrics
        self._short_steps, self._kept_steps = max_batch_steps // SHORT_SHARE, max_batch_steps // KEPT_SHARE
        self._short: deque[_Job] = deque()
        self._long: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._running_steps = self._running_short_steps = 0
        self._passed_steps = 0  # of those that have passed the first of the long ones
        self._numbers = itertools.count()
        self._recordings = Recordings(self._send, self._numbers, max_recordings, metrics)
        self._in_flight = 0
        self._room = asyncio.Condition()
        self._worker: Worker | None = None
        self._obeyed: deque[asyncio.Future[None]] = deque()
        self._open = self._closed = False
        self.available = True  # one that dies is replaced at once
        self.available_changed = asyncio.Event()

    def queue_age_s(self) -> float:
        """As Lane has it."""
        waiting = [jobs[0].queued_s for jobs in (self._short, self._long) if jobs]
        return time.perf_counter() - min(waiting) if waiting else 0.0

    async def warm_up(self, folders: list[Path]) -> None:
        """Begin the worker and load the bundles of these folders, so that the first request need not wait."""
        await self._obey(Load(folders))

    async def forget(self, folder: Path) -> None:
        """As Lane has it."""
        await self._obey(Forget(folder))

    def set_log_level(self, level: str) -> None:
        """As Lane has it; a worker that begins later has that of this process."""
        if self._worker is not None:
            self._worker.send(SetLogLevel(level))

    async def _obey(self, order: Load | Forget) -> None:
        obeyed = asyncio.get_running_loop().create_future()
        self._obeyed.append(obeyed)
        self._send(order)
        await obeyed

    def _send(self, order: Order) -> None:
        if self._worker is None:
            self._worker = worker = self._begin_worker()
            worker.listen(self._hear, lambda: self._worker_died(worker))
        self._worker.send(order)

    def _worker_died(self, worker: Worker) -> None:
        if worker is not self._worker or self._closed:
            return
        log.error("the lane has died; another begins with the next whole sequence")
        self._metrics.lane_died()
        self._worker = None
        obeyed, self._obeyed = self._obeyed, deque()
        for order in obeyed:
            if not order.done():
                order.set_exception(lost())
        for number in list(self._running):
            self._fail(number, lost())
        self._recordings.worker_died()
        self._go_on()

    def _hear(self, news: News) -> None:
        match news:
            case Obeyed(error):
                obeyed = self._obeyed.popleft()
                if obeyed.done():
                    return
                if error is None:
                    obeyed.set_result(None)
                else:
                    obeyed.set_exception(error)
            case Ended():
                self._end(news)
            case Ticked(ticks, ended):
                for tick in ticks:
                    self._metrics.batch(*tick)
                for one in ended:
                    self._end(one)
            case Told():
                self._recordings.hear(news)
        self._go_on()

    def _end(self, ended: Ended) -> None:
        number, outcome = ended
        if isinstance(outcome, str):
            log.error("a sequence failed: %s", outcome)
            self._fail(number, ExecutionFailed("the network could not compute this sequence"))
        elif not _is_finite(outcome):
            self._fail(number, ExecutionFailed("the sequence leads to a value that is not finite"))
        elif job := self._leave_worker(number):
            self._metrics.sequence(job.bundle.manifest.key)
            if not job.result.done():
                job.result.set_result(outcome)

    def _fail(self, number: int, refusal: ServingError) -> None:
        job = self._leave_worker(number)
        if job and not job.result.done():
            job.result.set_exception(refusal)

    def _leave_worker(self, number: int) -> _Job | None:
        job = self._running.pop(number, None)
        if job:
            self._count(job, -1)
        return job

    def _count(self, job: _Job, sign: int) -> None:
        self._running_steps += sign * job.steps
        self._running_short_steps += sign * job.steps * job.is_short

    async def predict(self, bundle: Bundle, sequences: list[NDArray[np.generic]], *, wait: bool) -> list[Floats]:
        """Each (steps, features) or (steps,) -> for each (steps, outputs), or (1, outputs) about the whole of it.

        Where the queue has no room, waits or raises QueueFull. Also raises ExecutionFailed, and LaneLost if the
        process died.
        """
        return await self._compute(bundle, sequences, None, wait=wait)

    async def decode(
        self, bundle: Bundle, sequences: list[NDArray[np.generic]], decoding: Decoding, *, wait: bool
    ) -> list[list[Hypothesis]]:
        """As Lane has it."""
        return await self._compute(bundle, sequences, decoding, wait=wait)

    async def _compute(
        self, bundle: Bundle, sequences: list[NDArray[np.generic]], decoding: Decoding | None, *, wait: bool
    ) -> list[Any]:
        await self._enter(len(sequences), wait=wait)
        loop, ahead = asyncio.get_running_loop(), bundle.manifest.look_ahead
        jobs = [
            _Job(bundle, sequence, decoding, len(sequence) + ahead <= self._short_steps, loop.create_future())
            for sequence in sequences
        ]
        for job in jobs:
            (self._short if job.is_short else self._long).append(job)
        self._go_on()
        try:
            return await asyncio.gather(*(job.result for job in jobs))
        finally:
            for job in jobs:
                job.result.cancel()  # what still waits is left out
            self._abandon(set(jobs))
            self._go_on()
            await self._leave(len(jobs))

    async def record(self, bundle: Bundle, *, wait: bool) -> Recording:
        """As Lane has it."""
        return await self._recordings.begin(bundle, wait=wait)

    async def run(self) -> None:
        """Send work, until cancelled."""
        self._open = True
        try:
            self._go_on()
            await asyncio.Event().wait()
        finally:
            self._open = False

    def close(self) -> None:
        """End the worker at once, whatever it computes."""
        self._closed = True
        if self._worker is not None:
            self._worker.end()

    def _abandon(self, jobs: set[_Job]) -> None:
        for number in [number for number, job in self._running.items() if job in jobs]:
            if job := self._leave_worker(number):
                self._metrics.sequence_abandoned(job.bundle.manifest.key)
            self._send(Abandon(number))

    def _go_on(self) -> None:
        """Send those for which there is memory."""
        if self._open:
            self._send_long()
            self._send_short()

    def _send_short(self) -> None:
        """In order; while long ones wait, as many as fit into what is kept for them."""
        while self._short:
            job = self._short[0]
            if not job.result.done():
                kept = self._running_short_steps + job.steps <= self._kept_steps
                if not (kept or (not self._long and self._has_memory(job))):
                    return
                self._begin(job)
            self._short.popleft()

    def _send_long(self) -> None:
        """In order, but that shorter ones pass the first for which there is no memory.

        No more steps pass it than may be under way; it goes alone if it is longer than that.
        """
        place = 0
        while place < min(len(self._long), LOOK_AHEAD):
            job = self._long[place]
            if not job.result.done():
                if place and self._passed_steps + job.steps > self._max_batch_steps:
                    return
                if not self._has_memory(job):
                    place += 1
                    continue
                self._begin(job)
                self._passed_steps += job.steps
            if not place:
                self._passed_steps = 0
            del self._long[place]

    def _has_memory(self, job: _Job) -> bool:
        """Beside what runs, the short ones that are in what is kept for them left out; always for one that is alone."""
        taken = self._running_steps - min(self._running_short_steps, self._kept_steps)
        return not taken or taken + job.steps <= self._max_batch_steps

    def _begin(self, job: _Job) -> None:
        number = next(self._numbers)
        self._running[number] = job
        self._metrics.sequence_begun(job.bundle.manifest.key, time.perf_counter() - job.queued_s)
        self._count(job, 1)
        self._send(Begin(number, job.bundle.folder, job.sequence, job.decoding))

    async def _enter(self, count: int, *, wait: bool) -> None:
        async with self._room:
            if wait:
                await self._room.wait_for(lambda: self._in_flight + count <= self._max_queued)
            elif self._in_flight + count > self._max_queued:
                raise full(self._in_flight, count, self._max_queued)
            self._in_flight += count
        self._metrics.queued(self._in_flight)

    async def _leave(self, count: int) -> None:
        self._in_flight -= count
        self._metrics.queued(self._in_flight)
        async with self._room:
            self._room.notify_all()


def _is_finite(answer: Answer) -> bool:
    if isinstance(answer, list):
        return all(math.isfinite(hypothesis.score) for hypothesis in answer)
    return bool(np.isfinite(answer).all())
