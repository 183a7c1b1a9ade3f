"""Variants of tasks, trained side by side over the same seeds, with intervals, as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.tasks.task import Run, Task
from models.training.card import parameters_of, table
from models.training.plots import draw_bars
from models.training.runs import Job, Result, run_all

SEEDS = 3
STUDENT_95 = 4.303  # for the mean of three


class Measured(NamedTuple):
    """What the runs of one variant came to, a value a seed."""

    task: Task
    results: Sequence[Result]

    @property
    def values(self) -> list[float]:
        """What the task measures first."""
        return [result.scores[0].value for result in self.results]

    @property
    def metric(self) -> str:
        """Its name."""
        return self.results[0].scores[0].metric


def train_variants(tasks: Mapping[str, Task], seed: int, processes: int = 2) -> dict[str, Measured]:
    """Each variant with each seed, two at a time."""
    jobs = [Job(task, Run(seed + i, task.runs(0)[0].held_out)) for task in tasks.values() for i in range(SEEDS)]
    found = iter(run_all(jobs, processes))
    return {name: Measured(task, [next(found) for _ in range(SEEDS)]) for name, task in tasks.items()}


def describe_variants(measured: Mapping[str, Measured]) -> str:
    """A row for each variant: its size, each seed, and the mean with its interval."""
    header = ["network", "parameters", *(f"seed {i}" for i in range(SEEDS)), "mean, 95 % interval"]
    rows = [
        [
            name,
            f"{parameters_of(one.task.network):,}",
            *(f"{value:.2f}" for value in one.values),
            "{:.2f} ± {:.2f}".format(*mean_and_half_width(one.values)),
        ]
        for name, one in measured.items()
    ]
    return table(header, rows)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Of three values; the interval is Student's."""
    return float(np.mean(values)), STUDENT_95 * float(np.std(values, ddof=1)) / len(values) ** 0.5


def draw_variants(path: Path, measured: Mapping[str, Measured]) -> None:
    """A bar for each mean, a dot for each seed."""
    draw_bars(path, {name: one.values for name, one in measured.items()}, next(iter(measured.values())).metric)
