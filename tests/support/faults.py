"""An executor whose steps fail as they say themselves, so that it is known which ones do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from service.engine.executor import Floats, StepExecutor

Array = NDArray[Any]
Fault = Literal["raises", "state turns NaN", "state turns infinite", "output turns NaN", "raises beside others"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
"""The last one is none for the step itself, which is tried again alone."""


@dataclass(frozen=True)
class Steps:
    """Random steps of a network. One whose first value is `first_fault`, or a little more, has a fault."""

    random: Callable[[int, np.random.Generator], Array]  # (steps, features) or (steps,)
    first_fault: int

    def faulty(self, fault: Fault, rng: np.random.Generator) -> Array:
        """One such step: (1, features) or (1,)."""
        step = self.random(1, rng)
        step.flat[0] = self.first_fault + FAULTS.index(fault)
        return step

    def fault_of(self, x: Array) -> Fault | None:
        """Of one step: (features,) or ()."""
        number = x.flat[0] - self.first_fault
        return FAULTS[int(number)] if 0 <= number < len(FAULTS) else None

    def seen(self, x: Array) -> Array:
        """What the network sees of a step."""
        if self.fault_of(x) is None:
            return x
        seen = x.copy()
        seen.flat[0] = 0
        return seen


class FaultyExecutor:
    """Another executor with faulty steps. `batches` has the size of every forward."""

    def __init__(self, inner: StepExecutor, steps: Steps) -> None:
        self.row_size = inner.row_size
        self.batches: list[int] = []
        self._inner = inner
        self._steps = steps
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[int, Callable[[], object]]] = []

    def after(self, forwards: int, turns: int, act: Callable[[], object]) -> None:
        """Let the event loop do that as soon as so many forwards have begun, and so many turns of it later."""
        for _ in range(turns):
            act = partial(self._loop.call_soon, act)
        if forwards:
            self._waiting.append((len(self.batches) + forwards, act))
        else:
            self._loop.call_soon(act)

    def step(self, inputs: Array, rows: Floats) -> tuple[Floats, Floats]:
        self.batches.append(len(inputs))
        self._loop.call_soon_threadsafe(self._begun, len(self.batches))
        faults = [self._steps.fault_of(x) for x in inputs]
        if "raises" in faults or ("raises beside others" in faults and len(faults) > 1):
            raise RuntimeError("a step of this batch fails")
        outputs, new_rows = self._inner.step(np.array([self._steps.seen(x) for x in inputs]), rows)
        outputs, new_rows = outputs.copy(), new_rows.copy()
        for output, row, fault in zip(outputs, new_rows, faults, strict=True):
            if fault == "output turns NaN":
                output[-1] = np.nan
            elif fault in ("state turns NaN", "state turns infinite"):
                row[-1] = np.nan if fault == "state turns NaN" else np.inf
        return outputs, new_rows

    def _begun(self, forward: int) -> None:
        due = [act for at, act in self._waiting if at <= forward]
        self._waiting = [(at, act) for at, act in self._waiting if at > forward]
        for act in due:
            act()
