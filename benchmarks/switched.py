"""`python -m benchmarks.switched`: the service, which counts nothing, counts, and counts and traces by turns.

What it did in each turn is appended to the file that a variable names. All turns are those of one process under one
load, a second each, so what else the machine does meets them alike.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from models.manifest import ModelKey
from service.__main__ import main
from service.metrics import Metrics
from service.tracing import Tracing

FILE_VARIABLE = "BENCHMARK_TURNS_FILE"
TURN_S = 1.0
NOTHING, METRICS, SPANS = KINDS = "counts nothing", "metrics", "metrics and spans"

SAMPLES_STEPS = Tracing, "samples_steps"
Methods: TypeAlias = dict[tuple[type, str], Callable[..., Any]]
"""By their classes and names."""


class Usage(NamedTuple):
    """So far."""

    steps: int
    wall_s: float
    cpu_s: float


class Switch:
    """Puts what counts in place, or what does nothing; steps are counted here in any case."""

    def __init__(self) -> None:
        self._steps = 0
        count, sample = Metrics.steps, Tracing.samples_steps

        def steps(metrics: Metrics, model: ModelKey, applied: int) -> None:
            self._steps += applied
            count(metrics, model, applied)

        def only_steps(_metrics: Metrics, _model: ModelKey, applied: int) -> None:
            self._steps += applied

        counting: Methods = {
            (Metrics, name): method
            for name, method in vars(Metrics).items()
            if callable(method) and not name.startswith("_")
        }
        counting[Metrics, "steps"] = steps
        self._methods: dict[str, Methods] = {
            NOTHING: dict.fromkeys(counting, _nothing) | {(Metrics, "steps"): only_steps, SAMPLES_STEPS: _never},
            METRICS: counting | {SAMPLES_STEPS: _never},
            SPANS: counting | {SAMPLES_STEPS: sample},
        }

    def put(self, kind: str) -> None:
        """From now on."""
        for (owner, name), method in self._methods[kind].items():
            setattr(owner, name, method)

    def usage(self) -> Usage:
        return Usage(self._steps, time.perf_counter(), time.process_time())

    def take_turns(self, file: Path) -> None:
        """Until the process ends; a line for each round, in which each kind has a turn."""
        order = deque(KINDS)
        while True:
            told = dict[str, list[float]]()
            for kind in order:
                self.put(kind)
                before = self.usage()
                time.sleep(TURN_S)
                told[kind] = [after - value for value, after in zip(before, self.usage(), strict=True)]
            with file.open("a") as lines:
                print(json.dumps(told), file=lines)
            order.rotate()


def _nothing(*_: object, **__: object) -> None:
    """Forget it."""


def _never(_: Tracing) -> bool:
    return False


if __name__ == "__main__":
    switch = Switch()
    threading.Thread(target=switch.take_turns, args=(Path(os.environ[FILE_VARIABLE]),), daemon=True).start()
    if exit_code := main():
        sys.exit(exit_code)
    os._exit(0)
