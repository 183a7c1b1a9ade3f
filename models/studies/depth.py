"""Shallow, stacked, and deep in each of the three blocks, at equal parameter counts (Pascanu et al., 2013)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models.recurrent import NetworkSpec
from models.studies.cells import as_large_as
from models.studies.variants import describe_variants, draw_variants, train_variants
from models.tasks.activity import ACTIVITY
from models.tasks.speaker import SPEAKER
from models.tasks.task import Task
from models.training.card import parameters_of

UNITS = 96  # of the shallow network, to whose size the others are fitted
TASKS = (SPEAKER, ACTIVITY)


def depths(task: Task) -> dict[str, NetworkSpec]:
    """By name, with about as many parameters each."""
    shallow = task.network.model_copy(
        update={
            "layers": 1,
            "input_layers": (),
            "transition_layers": 1,
            "output_layers": (),
            "hidden_size": UNITS,
        }
    )
    wanted = parameters_of(shallow)
    changes: dict[str, dict[str, object]] = {
        "shallow": {},
        "stacked": {"layers": 2},
        "deep input": {"input_layers": (32,)},
        "deep transition": {"transition_layers": 2},
        "deep output": {"output_layers": (32,)},
        "deep everywhere": {"layers": 2, "input_layers": (32,), "transition_layers": 2, "output_layers": (32,)},
    }
    return {name: as_large_as(shallow.model_copy(update=change), wanted) for name, change in changes.items()}


def compare(folder: Path, seed: int) -> Path:
    """Train, and write depth.md and a picture for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Depth in each of the three blocks",
        f"`python -m models compare depth --seed {seed}`: networks with about as many parameters, of which one is wide "
        "and the others are deep: two recurrent layers one upon the other, a layer before the recurrence, two cells in "
        "a row within a step, a layer behind the recurrence, or all of them. The settings are those of the task's "
        "bundle, three seeds; `activity` is one fold (people 9 and 10 held out).",
    ]
    for task in TASKS:
        measured = train_variants({name: replace(task, network=spec) for name, spec in depths(task).items()}, seed)
        picture = f"depth-{task.name}.png"
        draw_variants(folder / picture, measured)
        metric = next(iter(measured.values())).metric
        parts += [f"## {task.name}: {metric}", describe_variants(measured), f"![{task.name} by depth]({picture})"]
    page = folder / "depth.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page
