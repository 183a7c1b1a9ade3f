"""The vanilla cell beside GRU and LSTM, each with about as many parameters: where does the plain cell fail?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.recurrent import Cell, NetworkSpec
from models.studies.variants import describe_variants, draw_variants, train_variants
from models.tasks.activity import ACTIVITY
from models.tasks.sentiment import SENTIMENT
from models.tasks.speaker import SPEAKER
from models.tasks.task import Task
from models.training.card import parameters_of

CELLS: tuple[Cell, ...] = ("tanh", "relu", "gru", "lstm")
TASKS = (SPEAKER, ACTIVITY, SENTIMENT)


def with_cell(task: Task, cell: Cell) -> Task:
    """The same task with one layer of another cell, as wide as its recurrent parameters allow."""
    plain = task.network.model_copy(
        update={"layers": 1, "input_layers": (), "transition_layers": 1, "output_layers": ()}
    )
    wanted = parameters_of(plain)
    return replace(task, network=as_large_as(plain.model_copy(update={"cell": cell}), wanted))


def as_large_as(spec: NetworkSpec, parameters: int) -> NetworkSpec:
    """With the width at which it comes closest to so many parameters."""
    specs = (spec.model_copy(update={"hidden_size": width}) for width in range(8, 513))
    return min(specs, key=lambda candidate: abs(parameters_of(candidate) - parameters))


def compare(folder: Path, seed: int) -> Path:
    """Train, and write cells.md and a picture for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Vanilla, GRU and LSTM",
        f"`python -m models compare cells --seed {seed}`: one forward layer of each cell on the same data, with about "
        "as many parameters, the settings of the task's bundle and three seeds. Settings were chosen for the cell that "
        "is shipped, which favours it; `activity` is one fold (people 9 and 10 held out).",
    ]
    for task in TASKS:
        measured = train_variants({cell: with_cell(task, cell) for cell in CELLS}, seed)
        picture = f"cells-{task.name}.png"
        draw_variants(folder / picture, measured)
        metric = next(iter(measured.values())).metric
        parts += [f"## {task.name}: {metric}", describe_variants(measured), f"![{task.name} by cell]({picture})"]
    page = folder / "cells.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page
