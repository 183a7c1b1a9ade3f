"""Ticks: all sessions of a model that have a step ready share one forward, off the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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


MAX_LOOP_TICK_S = 0.005  # so long a thread may wait for the interpreter's lock anyway


@dataclass(frozen=True, slots=True)
class StepsResult:
    """What became of some steps.

    outputs (applied, outputs) of those that were applied, row (row_size,) the state after them, and why the next
    one could not be applied, if so.
    """

    outputs: Floats
    row: Floats
    failure: ExecutionFailed | None


@dataclass(eq=False, slots=True)
class _Job(StepJob):
    """Steps that somebody waits for."""

    result: asyncio.Future[StepsResult] = field(kw_only=True)

    def all_outputs(self) -> Floats:
        """(applied, outputs), in an array of its own: one of a tick's result would keep all of that alive."""
        if len(self.outputs) == 1:
            return self.outputs[0][np.newaxis].copy()
        return np.stack(self.outputs) if self.outputs else np.empty((0, 0), np.float32)


class StepEngine:
    """Runs ticks for as long as there are steps, one at a time.

    A short tick runs on the event loop, as soon as what has come at once is queued: in a thread it would wait for the
    interpreter's lock twice. One of a model whose last tick took longer than `max_loop_tick_s` runs in a thread, and
    the steps that come meanwhile share the next one.
    """

    def __init__(
        self,
        executors: Mapping[ModelKey, StepExecutor],
        *,
        max_tick_sessions: int,
        metrics: TickMetrics,
        max_loop_tick_s: float = MAX_LOOP_TICK_S,
    ) -> None:
        """`max_loop_tick_s` 0 = all in the thread."""
        self._executors = dict(executors)
        self._metrics = metrics
        self._max_loop_tick_s = max_loop_tick_s
        self._tick_s: dict[ModelKey, float] = {}
        self._batcher: Batcher[ModelKey, _Job] = Batcher(max_tick_sessions)
        self._under_way = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ticks")

    def add(self, model: ModelKey, executor: StepExecutor) -> None:
        """Step sessions of this model, too."""
        self._executors[model] = executor

    def remove(self, model: ModelKey) -> None:
        """Step none of it any more: what still waits fails."""
        self._executors.pop(model, None)
        self._tick_s.pop(model, None)

    def initial_row(self, model: ModelKey) -> Floats:
        """The state of a session before its first step."""
        return np.zeros(self._executors[model].row_size, np.float32)

    async def step(self, model: ModelKey, inputs: NDArray[np.generic], row: Floats) -> StepsResult:
        """Apply steps of one session in order: inputs (steps, features) or (steps,), row its state before them.

        The caller owns the state: if it is cancelled, nothing has changed. It must not call again for the same
        session before this call has returned.
        """
        loop = asyncio.get_running_loop()
        job = _Job(inputs, row, result=loop.create_future())
        self._batcher.add(model, job)
        if not self._under_way:
            self._under_way = True
            loop.call_soon(self._begin_tick, loop)
        try:
            return await job.result
        finally:
            job.abandoned = True

    def close(self) -> None:
        """Let the thread end after its tick."""
        self._thread.shutdown()

    def _begin_tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take and run; then the next, once the loop has done what is due."""
        model, jobs = self._batcher.take()
        executor = self._executors.get(model)
        if not jobs:
            self._end_tick(loop, model, jobs, [])
        elif executor is None:
            self._end_tick(loop, model, jobs, [ExecutionFailed("the model is served no more")] * len(jobs))
        elif self._tick_s.get(model, 0.0) < self._max_loop_tick_s:
            self._end_tick(loop, model, jobs, self._tick(model, executor, jobs))
        else:
            tick = loop.run_in_executor(self._thread, self._tick, model, executor, jobs)
            tick.add_done_callback(lambda ended: self._end_tick(loop, model, jobs, ended.result()))

    def _tick(self, model: ModelKey, executor: StepExecutor, jobs: list[_Job]) -> Sequence[Outcome]:
        start_s = time.perf_counter()
        outcomes = step_together(executor, jobs)
        self._tick_s[model] = duration_s = time.perf_counter() - start_s
        self._metrics.tick(model, len(jobs), duration_s)
        return outcomes

    def _end_tick(
        self, loop: asyncio.AbstractEventLoop, model: ModelKey, jobs: list[_Job], outcomes: Sequence[Outcome]
    ) -> None:
        for job, outcome in zip(jobs, outcomes, strict=True):
            failure = outcome if isinstance(outcome, ExecutionFailed) else None
            if not isinstance(outcome, ExecutionFailed):
                job.apply(*outcome)
            if job.result.done():  # a caller may go before its own cleanup has run
                continue
            if failure or job.done:
                job.result.set_result(StepsResult(job.all_outputs(), job.row, failure))
            else:
                self._batcher.add(model, job)
        self._under_way = bool(self._batcher)
        if self._under_way:
            loop.call_soon(self._begin_tick, loop)


Outcome = tuple[Floats, Floats] | ExecutionFailed
"""Of one step of one session: its output (outputs,) and new row (row_size,), or why there are none."""


def step_together(executor: StepExecutor, jobs: Sequence[StepJob]) -> Sequence[Outcome]:
    """One step of each job in one forward. One that fails leaves its neighbours alone."""
    try:
        inputs, rows = np.array([job.next_input for job in jobs]), np.array([job.row for job in jobs])
        outputs, new_rows = executor.step(inputs, rows)
    except Exception:
        if len(jobs) > 1:
            log.warning("a tick failed; its steps are tried one by one", exc_info=True)
            return [outcome for job in jobs for outcome in step_together(executor, [job])]
        log.exception("a step failed")
        return [ExecutionFailed("the network could not compute this step")]
    if np.isfinite(new_rows).all() and np.isfinite(outputs).all():
        return list(zip(outputs, new_rows, strict=True))
    finite = np.logical_and(np.isfinite(new_rows).all(axis=1), np.isfinite(outputs).all(axis=1)).tolist()
    return [
        (output, row) if ok else ExecutionFailed("the step leads to a value that is not finite")
        for output, row, ok in zip(outputs, new_rows, finite, strict=True)
    ]
