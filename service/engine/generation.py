"""Writing symbol by symbol: a state of its own goes through the same ticks as those of live streams."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from models.sampling import Doubles, Sampling, choose, log_probabilities
from service.engine.step_engine import StepEngine


class Finish(Enum):
    """Why an output is over."""

    END = "end"
    """The symbol that means it was drawn."""
    STOP = "stop"
    """It ends as it was asked to end."""
    MAX_SYMBOLS = "max_symbols"
    """It is as long as it may be."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written; symbols are their numbers."""

    read: NDArray[np.int64]
    """(steps,), one at least: what the network reads before it writes."""
    max_symbols: int
    sampling: Sampling
    seed: int
    end: int | None = None
    stops: tuple[tuple[int, ...], ...] = ()
    deterministic: bool = False
    """Its steps go alone, so that whatever else there is, the same seed gives the same output."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A symbol, its place in the output, and what the model had said: log_probabilities (symbols,)."""

    index: int
    symbol: int
    log_probabilities: Doubles


class Writer:
    """Writes one output. Once it is over, `finish` says why."""

    finish: Finish
    stop: int | None = None
    """The number of the stop that the output ends with."""
    end_log_probability: float | None = None
    """Of the symbol that means the end, if it was drawn."""

    def __init__(self, engine: StepEngine, model: ModelKey, plan: Plan, tenant: str = "") -> None:
        self.written = 0
        self._engine, self._model, self._plan, self._tenant = engine, model, plan, tenant
        self._random = np.random.Generator(np.random.PCG64(plan.seed))
        self._tail: deque[int] = deque(maxlen=max(map(len, plan.stops), default=0))

    async def write(self) -> AsyncGenerator[Drawn]:
        """Each symbol as it is drawn. Raises ExecutionFailed. Has a state in the engine until it is over or closed."""
        state = self._engine.states(self._model).add(self._engine.initial_row(self._model))
        steps = self._plan.read
        while True:
            result = await self._engine.step(self._model, steps, state, self._tenant, alone=self._plan.deterministic)
            if result.failure is not None:
                raise result.failure
            state.row[:] = result.row
            said = log_probabilities(result.outputs[-1])
            symbol = choose(said, self._plan.sampling, self._random.random())
            if symbol == self._plan.end:
                self.finish, self.end_log_probability = Finish.END, float(said[symbol])
                return
            self._note(symbol)
            yield Drawn(self.written - 1, symbol, said)
            if self._is_over():
                return
            steps = np.array([symbol], np.int64)

    def _note(self, symbol: int) -> None:
        self.written += 1
        self._tail.append(symbol)

    def _is_over(self) -> bool:
        tail = tuple(self._tail)
        self.stop = next((i for i, stop in enumerate(self._plan.stops) if tail[-len(stop) :] == stop), None)
        if self.stop is not None:
            self.finish = Finish.STOP
        elif self.written == self._plan.max_symbols:
            self.finish = Finish.MAX_SYMBOLS
        else:
            return False
        return True
