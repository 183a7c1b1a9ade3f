"""The plots of `make bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from benchmarks.recording import Row as RecordingRow
    from benchmarks.turns import Row


def plot(folder: Path, rows: dict[str, list[Row]]) -> None:
    """closed.svg and open.svg."""
    matplotlib.rcParams["svg.hashsalt"] = "rnnserve"
    draw(
        folder / "closed.svg",
        [*rows["closed"], *rows["multiplexed"], *rows["bare"]],
        "streams",
        "steps_per_s",
        "steps/s",
    )
    draw(folder / "open.svg", rows["open"], "offered_steps_per_s", "p99_ms", "p99, ms")


def draw(file: Path, rows: Sequence[Row], x: str, y: str, label: str) -> None:
    """A line for each server, with the least and the most of the turns."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(row.label for row in rows):
        own = [row for row in rows if row.label == name]
        xs = [getattr(row, x) for row in own]
        axes.plot(xs, [row.median(y) for row in own], marker="o", label=name)
        low, high = ([extreme(turn[y] for turn in row.turns) for row in own] for extreme in (min, max))
        axes.fill_between(xs, low, high, alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel=x.replace("_per_s", "/s").replace("_", " "), ylabel=label)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def draw_recordings(file: Path, rows: Sequence[RecordingRow]) -> None:
    """Time on the left, memory on the right, over the length."""
    matplotlib.rcParams["svg.hashsalt"] = "rnnserve"
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    steps = [row.steps for row in rows]
    time.plot(steps, [row.duration_s for row in rows], marker="o")
    time.set(xscale="log", yscale="log", xlabel="steps", ylabel="s")
    memory.plot(steps, [row.worker.anonymous_mib for row in rows], marker="o", label="worker, anonymous")
    memory.plot(steps, [row.worker.files_mib for row in rows], marker="o", label="worker, files")
    memory.plot(steps, [row.service.anonymous_mib + row.service.files_mib for row in rows], marker="o", label="service")
    spilled = [(row.steps, row.spilled_mib) for row in rows if row.spilled_mib]
    if spilled:
        memory.plot(*zip(*spilled, strict=True), marker="o", linestyle=":", label="on disk")
    memory.set(xscale="log", yscale="log", xlabel="steps", ylabel="MiB")
    memory.legend()
    for axes in (time, memory):
        axes.grid(visible=True, which="both", alpha=0.2)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
