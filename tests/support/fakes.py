"""Stand-ins for the parts next to the one under test."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.executor import Floats

RAISES = 666.0
TURNS_NAN = 13.0


class FakeExecutor:
    """Adds each step (1,) to the row (1,) and answers with the sum. Hears `RAISES` and `TURNS_NAN`.

    `ticks` has the inputs of every forward. While `gate` is clear a forward waits; `entered` says that one began.
    """

    row_size = 1

    def __init__(self) -> None:
        self.ticks: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.before_return: Callable[[], object] = lambda: None

    def step(self, inputs: NDArray[np.generic], rows: Floats) -> tuple[Floats, Floats]:
        values = inputs.astype(np.float32)
        self.ticks.append(values[:, 0].tolist())
        self.entered.set()
        if not self.gate.wait(30):
            raise TimeoutError("the test left the gate shut")
        if (values == RAISES).any():
            raise RuntimeError("secret of the executor")
        sums = rows + np.where(values == TURNS_NAN, np.nan, values).astype(np.float32)
        self.before_return()
        return sums, sums


class CountingMetrics:
    """Keeps what it was told, as (name, values…)."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def tick(self, model: ModelKey, sessions: int, duration_s: float) -> None:
        self.events.append(("tick", model, sessions))

    def steps(self, model: ModelKey, applied: int) -> None:
        self.events.append(("steps", model, applied))

    def session_opened(self, model: ModelKey) -> None:
        self.events.append(("opened", model))

    def session_closed(self, model: ModelKey) -> None:
        self.events.append(("closed", model))

    def queued(self, sequences: int) -> None:
        self.events.append(("queued", sequences))

    def batch(self, model: ModelKey, sequences: int, duration_s: float) -> None:
        self.events.append(("batch", model, sequences))


def column(*values: float) -> Floats:
    """Steps of one feature: (len(values), 1)."""
    return np.array(values, np.float32).reshape(-1, 1)
