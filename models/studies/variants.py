"""Variants of a task, trained over the same seeds and shown side by side: a table with intervals, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.markdown import table
from models.recurrent import NetworkSpec
from models.tasks.task import Run, Task
from models.training.card import parameters_of
from models.training.plots import Spread, draw_spreads
from models.training.runs import Job, Result, run_all

SEEDS = 3
STUDENT_95 = 4.303  # for the mean of three


class Measured(NamedTuple):
    """What the runs of one variant came to, a value a seed."""

    task: Task
    runs: Sequence[Run]
    results: Sequence[Result]

    @property
    def values(self) -> list[float]:
        """What the task measures first."""
        return [result.scores[0].value for result in self.results]

    @property
    def metric(self) -> str:
        """Its name."""
        return self.results[0].scores[0].metric


Variants = Mapping[str, Task]
"""By name."""


def train_variants(variants: Variants, seed: int, processes: int = 2) -> dict[str, Measured]:
    """Each with each seed, the first of their runs, two at a time."""
    runs = {name: [Run(seed + i, task.runs(0)[0].held_out) for i in range(SEEDS)] for name, task in variants.items()}
    found = iter(run_all([Job(task, run) for name, task in variants.items() for run in runs[name]], processes))
    return {name: Measured(task, runs[name], [next(found) for _ in range(SEEDS)]) for name, task in variants.items()}


Further = Callable[[Path, str, Mapping[str, Measured]], Sequence[str]]
"""What else a page says of a task, given the page and the task's name."""


def nothing_further(_page: Path, _task: str, _measured: Mapping[str, Measured]) -> Sequence[str]:
    """The table and the bars say all."""
    return ()


def write_page(
    page: Path,
    introduction: Sequence[str],
    by_task: Mapping[str, Variants],
    seed: int,
    further: Further = nothing_further,
) -> Path:
    """Train all, and write the page, and beside it a picture for each task."""
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = list(introduction)
    for task, variants in by_task.items():
        measured = train_variants(variants, seed)
        metric = next(iter(measured.values())).metric
        picture = f"{page.stem}-{task}.png"
        draw_spreads(page.parent / picture, {name: spread_of(one.values) for name, one in measured.items()}, metric)
        parts += [f"## {task}: {metric}", describe_variants(measured), f"![{page.stem}: {task}]({picture})"]
        parts += further(page, task, measured)
    page.write_text("\n\n".join(parts) + "\n")
    return page


def describe_variants(measured: Mapping[str, Measured]) -> str:
    """A row for each variant: its size, each seed, and the mean with its interval."""
    header = ["network", "parameters", *(f"seed {i}" for i in range(SEEDS)), "mean, 95 % interval"]
    rows = [
        [
            name,
            f"{parameters_of(one.task.network):,}",
            *(f"{value:.2f}" for value in one.values),
            "{1:.2f} ± {2:.2f}".format(*spread_of(one.values)),
        ]
        for name, one in measured.items()
    ]
    return table(header, rows)


def spread_of(values: Sequence[float]) -> Spread:
    """Of three values; the interval is Student's."""
    return Spread(values, float(np.mean(values)), STUDENT_95 * float(np.std(values, ddof=1)) / len(values) ** 0.5)


def as_large_as(spec: NetworkSpec, parameters: int) -> NetworkSpec:
    """With the width at which it comes closest to so many parameters."""
    specs = (spec.model_copy(update={"hidden_size": width}) for width in range(8, 513))
    return min(specs, key=lambda candidate: abs(parameters_of(candidate) - parameters))


def half_as_long(task: Task) -> Task:
    """Trained for half of the epochs, so that many variants of it can be."""
    return replace(task, settings=replace(task.settings, epochs=math.ceil(task.settings.epochs / 2)))


def shallow(spec: NetworkSpec) -> NetworkSpec:
    """The same with one layer in each of the three blocks."""
    return spec.model_copy(update={"layers": 1, "input_layers": (), "transition_layers": 1, "output_layers": ()})
