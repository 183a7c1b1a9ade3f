"""What the depth of each block brings: the same task, settings and runs, with one block at a time made deep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.recurrent import NetworkSpec
from models.tasks.task import Task
from models.training.card import ABLATION, add_ablation, parameters_of, table
from models.training.plots import draw_bars
from models.training.publish import REPOSITORY, VERSION
from models.training.runs import Job, run_all


def variants(deep: NetworkSpec) -> dict[str, NetworkSpec]:
    """From one plain layer to the given network, block by block."""
    stacked = deep.model_copy(update={"input_layers": (), "transition_layers": 1, "output_layers": ()})
    return {
        "one layer": stacked.model_copy(update={"layers": 1}),
        "stacked": stacked,
        "stacked + deep input": stacked.model_copy(update={"input_layers": deep.input_layers}),
        "stacked + deep transition": stacked.model_copy(update={"transition_layers": deep.transition_layers}),
        "stacked + deep output": stacked.model_copy(update={"output_layers": deep.output_layers}),
        "all": deep,
    }


def ablate(task: Task, seed: int, repository: Path = REPOSITORY, processes: int = 2) -> Path:
    """Train every variant in every run of the task, and write table and picture into its bundle."""
    folder = repository / task.name / str(VERSION)
    runs = task.runs(seed)
    specs = variants(task.network)
    jobs = [Job(replace(task, network=spec), run) for spec in specs.values() for run in runs]
    finished = iter(run_all(jobs, processes))
    scores = {name: [next(finished).scores[0] for _ in runs] for name in specs}
    percents = {name: [score.value for score in row] for name, row in scores.items()}
    metric = next(iter(scores.values()))[0].metric
    draw_bars(folder / "ablation.png", percents, metric)
    (folder / ABLATION).write_text(describe(task, percents, metric))
    add_ablation(folder)
    return folder / ABLATION


def describe(task: Task, percents: dict[str, list[float]], metric: str) -> str:
    """The table in Markdown: a row for each variant, a column for each run; then what follows from it."""
    header = ["network", "parameters", *(str(run) for run in task.runs(0)), "mean"]
    rows = [
        [
            name,
            f"{parameters_of(spec):,}",
            *(f"{percent:.1f}" for percent in (*percents[name], np.mean(percents[name]))),
        ]
        for name, spec in variants(task.network).items()
    ]
    verdicts = "\n".join(
        f"- {name}: {verdict(percents[name], percents[base])} {base}" for name, base in comparisons(percents)
    )
    return (
        f"The same settings, {task.settings.epochs} epochs and runs for each network, one seed; {metric}. "
        "The settings are those chosen for the last network.\n\n"
        f"{table(header, rows)}\n\n![ablation](ablation.png)\n\n{verdicts}\n"
    )


def comparisons(names: Iterable[str]) -> list[tuple[str, str]]:
    """Each variant with the one that it deepens by one step; the last with both shallow ones."""
    first, stacked, *deeper, last = names
    return [(stacked, first), *((name, stacked) for name in (*deeper, last)), (last, first)]


def verdict(values: list[float], base: list[float]) -> str:
    """The mean difference run by run, and whether it stands out from how much the runs differ in it."""
    differences = np.subtract(values, base)
    error = differences.std(ddof=1) / len(differences) ** 0.5
    clear = abs(differences.mean()) > 2 * error
    reading = ("better" if differences.mean() > 0 else "worse") if clear else "so no clear difference"
    return f"{differences.mean():+.1f} points (standard error {error:.1f}), {reading} {'than' if clear else 'to'}"
