"""The plots of benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib import ticker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks import sequence_report
    from benchmarks.recording import Row as RecordingRow
    from benchmarks.turns import Row

matplotlib.rcParams["svg.hashsalt"] = "rnnserve"


def plot(folder: Path, rows: dict[str, list[Row]]) -> None:
    """closed.svg and open.svg."""
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
        _line(axes, name, [getattr(row, x) for row in own], [[turn[y] for turn in row.turns] for row in own])
    axes.set(xscale="log", yscale="log", xlabel=x.replace("_per_s", "/s").replace("_", " "), ylabel=label)
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    _save(figure, file)


def draw_sequences(file: Path, rows: Sequence[sequence_report.Row], bound: str) -> None:
    """Closed loop: a panel for each distribution of lengths, a line for each server; that of `bound` is no server's."""
    figure, panels = _panels(1, list(dict.fromkeys(row.lengths for row in rows)))
    styles = {**_colours(row.server for row in rows if row.server != bound), bound: {"color": "grey", "ls": "--"}}
    ticks = sorted({row.in_flight for row in rows})
    for lengths, (axes,) in panels.items():
        for name, style in styles.items():
            if own := [row for row in rows if (row.server, row.lengths) == (name, lengths)]:
                _line(axes, name, [row.in_flight for row in own], [row.sequences_per_s() for row in own], **style)
        axes.set(xscale="log", title=f"{lengths} lengths", xlabel="sequences in flight")
        axes.set_xticks(ticks, labels=map(str, ticks), minor=False)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        _log_scale(axes, "sequences/s")
    _legend(figure, panels)
    _save(figure, file)


@dataclass(frozen=True)
class Latencies:
    """A line for each server."""

    title: str
    xlabel: str
    ticks: Sequence[str]
    values_ms: Mapping[str, Sequence[float]]
    behind: Sequence[str]
    """Servers that fall behind, whose points are hollow."""


def draw_latencies(file: Path, columns: Mapping[str, Sequence[Latencies]]) -> None:
    """A panel for each, as many in each column."""
    figure, panels = _panels(max(map(len, columns.values())), list(columns))
    styles = _colours(name for column in columns.values() for latencies in column for name in latencies.values_ms)
    for name, column in columns.items():
        for axes, latencies in zip(panels[name], column, strict=False):
            for server, values_ms in latencies.values_ms.items():
                face = "white" if server in latencies.behind else None
                axes.plot(latencies.ticks, values_ms, marker="o", mfc=face, label=server, **styles[server])
            axes.set(title=latencies.title, xlabel=latencies.xlabel)
            _log_scale(axes, "latency, ms")
    _legend(figure, panels)
    _save(figure, file)


def _panels(rows: int, columns: Sequence[str]) -> tuple[Figure, dict[str, list[Axes]]]:
    """Of each column from above."""
    size = (6 * len(columns), 4.2 * rows)
    figure, axes = plt.subplots(rows, len(columns), figsize=size, layout="constrained", squeeze=False)
    return figure, {name: list(axes[:, number]) for number, name in enumerate(columns)}


def _colours(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """One for each name, in this order."""
    return {name: {"color": f"C{number}"} for number, name in enumerate(dict.fromkeys(names))}


def _line(axes: Axes, name: str, xs: Sequence[float], turns: Sequence[Sequence[float]], **style: Any) -> None:
    """Medians of the turns at each x, with the least and the most."""
    (line,) = axes.plot(xs, [median(values) for values in turns], marker="o", label=name, **style)
    axes.fill_between(xs, [*map(min, turns)], [*map(max, turns)], alpha=0.15, color=line.get_color())


def _log_scale(axes: Axes, ylabel: str) -> None:
    """With numbers at 1, 2 and 5 of each decade."""
    axes.set(yscale="log", ylabel=ylabel)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(visible=True, alpha=0.3)


def _legend(figure: Figure, panels: Mapping[str, Sequence[Axes]]) -> None:
    """One for all panels."""
    lines = {line.get_label(): line for column in panels.values() for axes in column for line in axes.get_lines()}
    figure.legend(lines.values(), map(str, lines), loc="outside right center")


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def draw_ticks(
    file: Path,
    steps: Sequence[str],
    per_s: Mapping[str, Sequence[float]],
    p90_ms: Mapping[str, Sequence[float]],
    p90_label: str,
) -> None:
    """Over the steps of a tick: sequences/s on the left, p90 on the right, a line for each load."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, lines in ((left, per_s), (right, p90_ms)):
        for load, values in lines.items():
            axes.plot(steps, values, marker="o", label=load)
        axes.set(xlabel="steps of a tick")
        axes.tick_params(axis="x", rotation=45)
        axes.grid(visible=True, alpha=0.2)
        axes.legend()
    left.set(ylabel="sequences/s", ylim=(0, None))
    right.set(ylabel=p90_label, yscale="log")
    _save(figure, file)


def draw_recordings(file: Path, rows: Sequence[RecordingRow]) -> None:
    """Time on the left, memory on the right, over the length."""
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
    _save(figure, file)
