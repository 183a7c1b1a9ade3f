"""The lane for whole sequences, which are computed where they never hold up a live step.

Sequences wait in a bounded queue; those of one model that wait together share a padded forward.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.manifest import ModelKey
from service.engine import lane_process
from service.engine.executor import Floats
from service.errors import ExecutionFailed, LaneLost, QueueFull, ServingError

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1.0
Argument = TypeVar("Argument")


class LaneMetrics(Protocol):
    """Where whole sequences are counted."""

    def queued(self, sequences: int) -> None:
        """So many wait or run now."""
        ...

    def batch(self, model: ModelKey, sequences: int, duration_s: float) -> None:
        """So many shared a forward."""
        ...


class Lane(Protocol):
    """Runs whole sequences, in this service's own process for them or in that of all workers."""

    available: bool
    """Whether there is such a process now."""
    available_changed: asyncio.Event

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
    result: asyncio.Future[Floats]


class SequenceLane:
    """Queues whole sequences and runs them batch by batch in its process."""

    def __init__(
        self,
        spawn: Callable[[], Executor],
        *,
        max_queued: int,
        max_batch: int,
        max_batch_steps: int,
        metrics: LaneMetrics,
    ) -> None:
        """`spawn` starts what computes them; again if that dies."""
        self._spawn = spawn
        self._max_queued = max_queued
        self._max_batch = max_batch
        self._max_batch_steps = max_batch_steps
        self._metrics = metrics
        self._queue: deque[_Job] = deque()
        self._in_flight = 0
        self._room = asyncio.Condition()
        self._job_added = asyncio.Event()
        self._process = spawn()
        self.available = True  # one that dies is replaced at once
        self.available_changed = asyncio.Event()

    async def warm_up(self, folders: list[Path]) -> None:
        """Start the process and load the bundles of these folders, so that the first request need not wait."""
        await self._in_process(lane_process.load, folders)

    async def forget(self, folder: Path) -> None:
        """As Lane has it."""
        await self._in_process(lane_process.forget, folder)

    async def _in_process(self, work: Callable[[Argument], None], argument: Argument) -> None:
        process = self._process
        try:
            await lane_process.submit(process, work, argument)
        except BrokenProcessPool:
            self._replace(process)
            raise lost() from None

    def _replace(self, process: Executor) -> None:
        """It has died; whoever finds out first starts another."""
        if process is self._process:
            log.error("the process for whole sequences died; starting another")
            self._process = self._spawn()

    async def predict(self, bundle: Bundle, sequences: list[NDArray[np.generic]], *, wait: bool) -> list[Floats]:
        """Each (steps, features) or (steps,) -> for each (steps, outputs), or (1, outputs) about the whole of it.

        Where the queue has no room, waits or raises QueueFull. Also raises ExecutionFailed, and LaneLost if the
        process died.
        """
        await self._enter(len(sequences), wait=wait)
        loop = asyncio.get_running_loop()
        jobs = [_Job(bundle, sequence, loop.create_future()) for sequence in sequences]
        self._queue.extend(jobs)
        self._job_added.set()
        try:
            return await asyncio.gather(*(job.result for job in jobs))
        finally:
            for job in jobs:
                job.result.cancel()  # what still waits is left out of the next batch
            await self._leave(len(jobs))

    async def run(self) -> None:
        """Take and run batches until cancelled."""
        while True:
            await self._job_added.wait()
            while batch := self._take():
                await self._run(batch)
            self._job_added.clear()

    def close(self) -> None:
        """End the process at once, whatever it computes."""
        lane_process.end(self._process)

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

    def _take(self) -> list[_Job]:
        """The longest waiting sequence and others of its model, in the order of their arrival."""
        waiting = [job for job in self._queue if not job.result.done()]
        same_model = (job for job in waiting if job.bundle is waiting[0].bundle)
        batch = list(itertools.islice(same_model, self._max_batch))
        while len(batch) > 1 and len(batch) * max(len(job.sequence) for job in batch) > self._max_batch_steps:
            batch.pop()  # padded to the longest, they would take too much memory
        taken = set(batch)
        self._queue = deque(job for job in waiting if job not in taken)
        return batch

    async def _run(self, batch: list[_Job]) -> None:
        start_s, process = time.perf_counter(), self._process
        bundle, sequences = batch[0].bundle, [job.sequence for job in batch]
        try:
            outputs = await lane_process.submit(process, lane_process.run, (bundle.folder, sequences))
        except Exception as error:
            if isinstance(error, BrokenProcessPool):
                self._replace(process)
            await self._fail(batch, error)
            return
        self._metrics.batch(bundle.manifest.key, len(batch), time.perf_counter() - start_s)
        for job, output in zip(batch, outputs, strict=True):
            if job.result.done():
                continue
            if np.isfinite(output).all():
                job.result.set_result(output)
            else:
                job.result.set_exception(ExecutionFailed("the sequence leads to a value that is not finite"))

    async def _fail(self, batch: list[_Job], error: Exception) -> None:
        """A batch fails one by one, so that only the guilty sequence does; a dead process fails what it held."""
        if isinstance(error, BrokenProcessPool):
            refusal: ServingError = lost()
        elif len(batch) > 1:
            log.warning("a batch failed; its sequences are tried one by one", exc_info=error)
            for job in batch:
                await self._run([job])
            return
        else:
            log.error("a sequence failed", exc_info=error)
            refusal = ExecutionFailed("the network could not compute this sequence")
        for job in batch:
            if not job.result.done():
                job.result.set_exception(refusal)


def full(waiting: int, more: int, limit: int) -> QueueFull:
    """The refusal of more sequences than may wait."""
    return QueueFull(
        f"{waiting} sequences wait; with {more} more there would be over {limit}",
        retry_after_s=RETRY_AFTER_S,
        limit=limit,
    )


def lost() -> LaneLost:
    """The refusal of what the process held when it died."""
    return LaneLost("the process that computed the sequence died", retry_after_s=RETRY_AFTER_S)
