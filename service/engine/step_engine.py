"""Ticks: all sessions of a model that have a step ready share one forward, off the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.batcher import Batcher, StepJob
from service.engine.executor import Floats, StepExecutor
from service.errors import ExecutionFailed

log = logging.getLogger(__name__)


class TickMetrics(Protocol):
    """Where ticks are counted."""

    def tick(self, model: ModelKey, sessions: int, duration_s: float) -> None:
        """A tick stepped so many sessions of the model."""
        ...


@dataclass(frozen=True)
class StepsResult:
    """What became of some steps.

    outputs (applied, outputs) of those that were applied, row (row_size,) the state after them, and why the next
    one could not be applied, if so.
    """

    outputs: Floats
    row: Floats
    failure: ExecutionFailed | None


class StepEngine:
    """Runs ticks for as long as there are steps. At most one tick runs at a time, in a thread of its own."""

    def __init__(
        self, executors: Mapping[ModelKey, StepExecutor], *, max_tick_sessions: int, metrics: TickMetrics
    ) -> None:
        self._executors = dict(executors)
        self._metrics = metrics
        self._batcher: Batcher[ModelKey] = Batcher(max_tick_sessions)
        self._results: dict[StepJob, asyncio.Future[StepsResult]] = {}
        self._job_added = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ticks")

    def add(self, model: ModelKey, executor: StepExecutor) -> None:
        """Step sessions of this model, too."""
        self._executors[model] = executor

    def remove(self, model: ModelKey) -> None:
        """Step none of it any more: what still waits fails."""
        self._executors.pop(model, None)

    def initial_row(self, model: ModelKey) -> Floats:
        """The state of a session before its first step."""
        return np.zeros(self._executors[model].row_size, np.float32)

    async def step(self, model: ModelKey, inputs: NDArray[np.generic], row: Floats) -> StepsResult:
        """Apply steps of one session in order: inputs (steps, features) or (steps,), row its state before them.

        The caller owns the state: if it is cancelled, nothing has changed. It must not call again for the same
        session before this call has returned.
        """
        job = StepJob(inputs, row)
        result: asyncio.Future[StepsResult] = asyncio.get_running_loop().create_future()
        self._results[job] = result
        self._batcher.add(model, job)
        self._job_added.set()
        try:
            return await result
        finally:
            job.abandoned = True
            del self._results[job]

    async def run(self) -> None:
        """Fill, take, run; until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._job_added.wait()
            while self._batcher:
                model, jobs = self._batcher.take()
                executor = self._executors.get(model)
                if jobs and executor:
                    outcomes = await loop.run_in_executor(self._thread, self._tick, model, executor, jobs)
                    self._settle(model, jobs, outcomes)
                elif jobs:
                    self._settle(model, jobs, [ExecutionFailed("the model is served no more")] * len(jobs))
            self._job_added.clear()

    def close(self) -> None:
        """Let the thread end after its tick."""
        self._thread.shutdown()

    def _tick(self, model: ModelKey, executor: StepExecutor, jobs: list[StepJob]) -> Sequence[Outcome]:
        start_s = time.perf_counter()
        outcomes = step_together(executor, jobs)
        self._metrics.tick(model, len(jobs), time.perf_counter() - start_s)
        return outcomes

    def _settle(self, model: ModelKey, jobs: list[StepJob], outcomes: Sequence[Outcome]) -> None:
        for job, outcome in zip(jobs, outcomes, strict=True):
            failure = outcome if isinstance(outcome, ExecutionFailed) else None
            if not isinstance(outcome, ExecutionFailed):
                job.apply(*outcome)
            if job.abandoned or self._results[job].cancelled():  # a caller may go before its own cleanup has run
                continue
            if failure or job.done:
                outputs = np.stack(job.outputs) if job.outputs else np.empty((0, 0), np.float32)
                self._results[job].set_result(StepsResult(outputs, job.row, failure))
            else:
                self._batcher.add(model, job)


Outcome = tuple[Floats, Floats] | ExecutionFailed
"""Of one step of one session: its output (outputs,) and new row (row_size,), or why there are none."""


def step_together(executor: StepExecutor, jobs: Sequence[StepJob]) -> Sequence[Outcome]:
    """One step of each job in one forward. One that fails leaves its neighbours alone."""
    inputs = np.stack([job.next_input for job in jobs])
    rows = np.stack([job.row for job in jobs])
    try:
        outputs, new_rows = executor.step(inputs, rows)
    except Exception:
        if len(jobs) > 1:
            log.warning("a tick failed; its steps are tried one by one", exc_info=True)
            return [outcome for job in jobs for outcome in step_together(executor, [job])]
        log.exception("a step failed")
        return [ExecutionFailed("the network could not compute this step")]
    finite = np.logical_and(np.isfinite(new_rows).all(axis=1), np.isfinite(outputs).all(axis=1)).tolist()
    return [
        (output, row) if ok else ExecutionFailed("the step leads to a value that is not finite")
        for output, row, ok in zip(outputs, new_rows, finite, strict=True)
    ]
