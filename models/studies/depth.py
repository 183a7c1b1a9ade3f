"""Shallow, stacked, and deep in each of the three blocks, at equal parameter counts (Pascanu et al., 2013)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.studies.variants import Variants, as_large_as, half_as_long, shallow, write_page
from models.tasks.activity import ACTIVITY
from models.tasks.speaker import SPEAKER
from models.tasks.task import Task
from models.training.card import parameters_of

UNITS = 96  # of the shallow network, to whose size the others are fitted
TASKS = (SPEAKER, half_as_long(ACTIVITY))
DEEPER: dict[str, dict[str, object]] = {
    "shallow": {},
    "stacked": {"layers": 2},
    "deep input": {"input_layers": (32,)},
    "deep transition": {"transition_layers": 2},
    "deep output": {"output_layers": (32,)},
    "deep everywhere": {"layers": 2, "input_layers": (32,), "transition_layers": 2, "output_layers": (32,)},
}


def depths_of(task: Task) -> Variants:
    """The same task with networks that are deep in one block or in all, with about as many parameters."""
    wide = shallow(task.network).model_copy(update={"hidden_size": UNITS})
    specs = {name: as_large_as(wide.model_copy(update=deeper), parameters_of(wide)) for name, deeper in DEEPER.items()}
    return {name: replace(task, network=spec) for name, spec in specs.items()}


def compare(folder: Path, seed: int) -> Path:
    """Train, and write depth.md and a picture for each task."""
    introduction = (
        "# Depth in each of the three blocks",
        f"`python -m models compare depth --seed {seed}`: networks with about as many parameters, of which one is wide "
        "and the others are deep: two recurrent layers one upon the other, a layer before the recurrence, two cells in "
        "a row within a step, a layer behind the recurrence, or all of them. The settings are those of the task's "
        "bundle, three seeds; `activity` is trained for half as long, and is one fold (people 9 and 10 held out).",
    )
    return write_page(folder / "depth.md", introduction, {task.name: depths_of(task) for task in TASKS}, seed)
