"""Ticks: all sessions of a model that have a step ready share one forward."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.batcher import Batcher, StepJob
from service.engine.executor import Floats, StepExecutor
from service.engine.states import Places, State, StateArray
from service.errors import ExecutionFailed

log = logging.getLogger(__name__)

Values = TypeVar("Values", bound=NDArray[Any])


class TickMetrics(Protocol):
    """Where ticks are counted."""

    def waited(self, model: ModelKey, duration_s: float) -> None:
        """A job of the model has waited so long for a tick."""
        ...

    def tick(self, model: ModelKey, sessions: int, duration_s: float) -> None:
        """A tick stepped so many sessions of the model."""
        ...


MAX_LOOP_TICK_S = 0.005  # so long a thread may wait for the interpreter's lock anyway


@dataclass(slots=True)  # not frozen, as what each step makes: that takes a microsecond more
class Stepped:
    """What a tick gave: outputs (steps, outputs), and states (steps, row_size) after the steps.

    Those of the steps in `failures` mean nothing.
    """

    outputs: Floats
    states: Floats
    failures: Mapping[int, ExecutionFailed]

    def part(self, start: int, end: int) -> Stepped:
        """Of some steps only."""
        if end - start == len(self.outputs):
            return self
        failures = self.failures
        if failures:
            failures = {step - start: why for step, why in failures.items() if start <= step < end}
        return Stepped(self.outputs[start:end], self.states[start:end], failures)


@dataclass(eq=False, slots=True)
class TickJob(StepJob, ABC):
    """Steps that take what becomes of them. places (sessions,): where the states are, one if they go in turn."""

    places: Places = field(kw_only=True)
    queued_s: float = field(default=0.0, kw_only=True)  # since when it waits for the next tick
    waited_s: float = field(default=0.0, kw_only=True)  # for all so far
    computed_s: float = field(default=0.0, kw_only=True)  # they took in all

    def places_of_last(self, steps: int) -> Places:
        """Of the last steps that were taken: (steps,)."""
        return self.places if self.in_turn else self.places[self.taken - steps : self.taken]

    @abstractmethod
    def applied(self, stepped: Stepped, start: int, end: int) -> None:
        """The last steps that were taken gave what is there from start to end. Keep the states that you want, now."""

    @abstractmethod
    def drop(self) -> None:
        """`applied` raised: whoever waits is told that nothing more will come."""


_NOTHING: Floats = np.empty((0, 0), np.float32)


Share = tuple[TickJob, int]
"""A job, and how many of its steps a tick has."""


@dataclass(slots=True)
class StepsResult:
    """What became of steps in a row, and why there are no more.

    outputs (applied, outputs); row (row_size,), the state after those, if any: keep its values, not the array.
    `waited_s` for their ticks, which took `computed_s`.
    """

    outputs: Floats
    row: Floats
    failure: ExecutionFailed | None
    waited_s: float = 0.0
    computed_s: float = 0.0


@dataclass(eq=False, slots=True)
class _StepsInTurn(TickJob):
    """Steps of one session that somebody waits for. `state` is where the next one finds what the last one left."""

    state: State = field(kw_only=True)
    result: asyncio.Future[StepsResult] = field(kw_only=True)
    row: Floats = field(default_factory=lambda: _NOTHING)
    outputs: list[Floats] = field(default_factory=list)

    def applied(self, stepped: Stepped, start: int, end: int) -> None:
        failure = stepped.failures.get(start) if stepped.failures else None
        over = failure is not None or self.taken == len(self.inputs)
        if failure is None:
            self.row = stepped.states[start]
            self.outputs.append(stepped.outputs[start:end])
            if not over:
                self.state.row[:] = self.row
        if self.result.done():  # the caller may have gone before its own cleanup has run
            self.abandoned = True
        elif over:
            self.abandoned = True
            outputs = self._all_outputs()
            self.result.set_result(StepsResult(outputs, self.row, failure, self.waited_s, self.computed_s))

    def drop(self) -> None:
        if not self.result.done():
            self.result.set_result(StepsResult(_NOTHING, _NOTHING, ExecutionFailed("the step's answer was lost")))

    def _all_outputs(self) -> Floats:
        """(applied, outputs), in an array of its own: one of a tick's result would keep all of that alive."""
        if len(self.outputs) == 1:
            return self.outputs[0].copy()
        return np.concatenate(self.outputs) if self.outputs else _NOTHING


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
        prepare_thread: Callable[[], object] | None = None,
    ) -> None:
        """`max_loop_tick_s` 0 = all in the thread, which calls `prepare_thread` first."""
        self._executors: dict[ModelKey, StepExecutor] = {}
        self._states: dict[ModelKey, StateArray] = {}
        self._metrics = metrics
        self._max_loop_tick_s = max_loop_tick_s
        self._tick_s: dict[tuple[ModelKey, bool], float] = {}  # of the last one; bool: whether a step had it alone
        self._batcher: Batcher[ModelKey, TickJob] = Batcher(max_tick_sessions)
        self._under_way = False
        self._thread = ThreadPoolExecutor(1, "ticks", initializer=prepare_thread)
        for model, executor in executors.items():
            self.add(model, executor)

    def add(self, model: ModelKey, executor: StepExecutor) -> None:
        """Step sessions of this model, too. States that there are of it stay where they are, if they fit."""
        self._executors[model] = executor
        states = self._states.get(model)
        if states is None or states.row_size != executor.row_size:
            self._states[model] = StateArray(executor.row_size)

    def remove(self, model: ModelKey) -> None:
        """Step none of it any more: what still waits fails."""
        self._executors.pop(model, None)
        for alone in (False, True):
            self._tick_s.pop((model, alone), None)

    def states(self, model: ModelKey) -> StateArray:
        """Of its sessions."""
        return self._states[model]

    def initial_row(self, model: ModelKey) -> Floats:
        """The state of a session before its first step."""
        return np.zeros(self._states[model].row_size, np.float32)

    async def step(
        self, model: ModelKey, inputs: NDArray[np.generic], state: State, tenant: str = "", *, alone: bool = False
    ) -> StepsResult:
        """Apply steps of one session in order: inputs (steps, features) or (steps,), from its state before them.

        `alone` = each in a tick of its own, so that the same inputs lead to the same bits whoever else has steps.
        The state stays as it is. The caller must not call again for the same session before this call has returned.
        """
        result = asyncio.get_running_loop().create_future()
        own = state if len(inputs) == 1 else state.copy()  # only what is between two steps is written there
        job = _StepsInTurn(inputs, True, tenant, places=np.array([own.place]), alone=alone, state=own, result=result)
        self.submit(model, job)
        try:
            return await job.result
        finally:
            job.abandoned = True

    def submit(self, model: ModelKey, job: TickJob) -> None:
        """Let it have its ticks. No session of it may have another job under way."""
        self._enqueue(model, job)
        if not self._under_way:
            self._under_way = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._begin_tick, loop)

    def queue(self) -> tuple[int, float]:
        """How many steps wait for a tick now, and how long the first of them has."""
        waiting = [(job.left, job.queued_s) for job in self._batcher.waiting()]
        steps, now_s = sum(left for left, _ in waiting), time.perf_counter()
        return steps, now_s - min((since_s for _, since_s in waiting), default=now_s)

    def _enqueue(self, model: ModelKey, job: TickJob) -> None:
        job.queued_s = time.perf_counter()
        self._batcher.add(model, job)

    def close(self) -> None:
        """Let the thread end after its tick."""
        self._thread.shutdown()

    def _begin_tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take and run; then the next, once the loop has done what is due."""
        model, shares = self._batcher.take()
        executor = self._executors.get(model)
        if not shares:
            self._go_on(loop)
        elif executor is None:
            self._end_tick(loop, model, shares, _none_of(shares, "the model is served no more"))
        elif self._tick_s.get((model, shares[0][0].alone), 0.0) < self._max_loop_tick_s:
            self._end_tick(loop, model, shares, self._tick(model, executor, shares))
        else:
            tick = loop.run_in_executor(self._thread, self._tick, model, executor, shares)
            tick.add_done_callback(lambda ended: self._end_tick(loop, model, shares, ended.result()))

    def _tick(self, model: ModelKey, executor: StepExecutor, shares: list[Share]) -> Stepped:
        """Never raises: nothing would begin the next tick."""
        try:
            return self._run(model, executor, shares)
        except Exception:
            log.exception("a tick failed")
            return _none_of(shares, "the network could not compute this step")

    def _run(self, model: ModelKey, executor: StepExecutor, shares: list[Share]) -> Stepped:
        start_s = time.perf_counter()
        inputs = _joined([job.inputs[job.taken - steps : job.taken] for job, steps in shares])
        places = _joined([job.places_of_last(steps) for job, steps in shares])
        stepped = step_together(executor, inputs, self._states[model].rows.take(places, axis=0))
        self._tick_s[model, shares[0][0].alone] = duration_s = time.perf_counter() - start_s
        for job, _ in shares:
            waited_s = start_s - job.queued_s
            job.waited_s += waited_s
            job.computed_s += duration_s
            self._metrics.waited(model, waited_s)
        self._metrics.tick(model, len(places), duration_s)
        return stepped

    def _end_tick(
        self, loop: asyncio.AbstractEventLoop, model: ModelKey, shares: list[Share], stepped: Stepped
    ) -> None:
        start = 0
        for job, steps in shares:
            try:
                job.applied(stepped, start, start + steps)
            except Exception:
                log.exception("what a tick gave was lost")
                job.abandoned = True
                job.drop()
            start += steps
            if job.left:
                self._enqueue(model, job)
        self._go_on(loop)

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._under_way = bool(self._batcher)
        if self._under_way:
            loop.call_soon(self._begin_tick, loop)


def _joined(parts: list[Values]) -> Values:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)  # type: ignore[return-value]


def _none_of(shares: list[Share], why: str) -> Stepped:
    return _all_failed(sum(steps for _, steps in shares), ExecutionFailed(why))


def _all_failed(steps: int, failure: ExecutionFailed) -> Stepped:
    nothing = np.empty((steps, 0), np.float32)
    return Stepped(nothing, nothing, dict.fromkeys(range(steps), failure))


def step_together(executor: StepExecutor, inputs: NDArray[np.generic], rows: Floats) -> Stepped:
    """One step of each of several sessions in one forward. One that fails leaves its neighbours alone.

    inputs (batch, features) or (batch,), rows (batch, row_size): the states before it.
    """
    try:
        outputs, new_rows = executor.step(inputs, rows)
    except Exception:
        if len(inputs) > 1:
            log.warning("a tick failed; its steps are tried one by one", exc_info=True)
            return _one_by_one(executor, inputs, rows)
        log.exception("a step failed")
        return _all_failed(1, ExecutionFailed("the network could not compute this step"))
    if isfinite(np.vdot(new_rows, new_rows)) and isfinite(np.vdot(outputs, outputs)):  # or else one may just be large
        return Stepped(outputs, new_rows, {})
    finite = np.logical_and(np.isfinite(new_rows).all(axis=1), np.isfinite(outputs).all(axis=1))
    failure = ExecutionFailed("the step leads to a value that is not finite")
    return Stepped(outputs, new_rows, dict.fromkeys(np.nonzero(~finite)[0].tolist(), failure))


def _one_by_one(executor: StepExecutor, inputs: NDArray[np.generic], rows: Floats) -> Stepped:
    alone = [step_together(executor, inputs[i : i + 1], rows[i : i + 1]) for i in range(len(inputs))]
    failures = {i: one.failures[0] for i, one in enumerate(alone) if one.failures}
    widths = {one.outputs.shape[1] for i, one in enumerate(alone) if i not in failures} or {0}
    outputs = np.zeros((len(inputs), max(widths)), np.float32)
    states = np.zeros_like(rows)
    for i, one in enumerate(alone):
        if i not in failures:
            outputs[i], states[i] = one.outputs[0], one.states[0]
    return Stepped(outputs, states, failures)
