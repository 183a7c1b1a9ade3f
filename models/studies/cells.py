"""The vanilla cell beside GRU and LSTM, each with about as many parameters: where does the plain cell fail?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.recurrent import Cell
from models.studies.variants import Variants, as_large_as, half_as_long, shallow, write_page
from models.tasks.activity import ACTIVITY
from models.tasks.sentiment import SENTIMENT
from models.tasks.speaker import SPEAKER
from models.tasks.task import Task
from models.training.card import parameters_of

CELLS: tuple[Cell, ...] = ("tanh", "relu", "gru", "lstm")
TASKS = (SPEAKER, half_as_long(ACTIVITY), half_as_long(SENTIMENT))


def cells_of(task: Task) -> Variants:
    """The same task with one layer of each cell, as wide as the size of the first one's network allows."""
    plain = shallow(task.network)
    specs = {cell: as_large_as(plain.model_copy(update={"cell": cell}), parameters_of(plain)) for cell in CELLS}
    return {cell: replace(task, network=spec) for cell, spec in specs.items()}


def compare(folder: Path, seed: int) -> Path:
    """Train, and write cells.md and a picture for each task."""
    introduction = (
        "# Vanilla, GRU and LSTM",
        f"`python -m models compare cells --seed {seed}`: one forward layer of each cell on the same data, with about "
        "as many parameters, the settings of the task's bundle and three seeds; `activity` and `sentiment` are trained "
        "for half as long, and `activity` is one fold (people 9 and 10 held out). Settings were chosen for the cell "
        "that is shipped, which favours it.",
    )
    return write_page(folder / "cells.md", introduction, {task.name: cells_of(task) for task in TASKS}, seed)
