"""The pictures in a bundle: small PNG files, drawn without a screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.training.loop import Fitted


@contextmanager
def _picture(path: Path, plots: int = 1) -> Iterator[Sequence[Axes]]:
    figure = Figure(figsize=(4.8 * plots, 3.2), layout="constrained")
    axes = figure.subplots(1, plots, squeeze=False)[0]
    yield axes
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylabel(textwrap.fill(ax.get_ylabel(), 30))
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_curves(path: Path, fitted: Fitted, metric: str) -> None:
    """Losses and what is measured on the validation part by epoch, and which epoch was the best."""
    history = fitted.history
    numbers = [epoch.number for epoch in history]
    with _picture(path, plots=2) as (left, right):
        left.plot(numbers, [epoch.train_loss for epoch in history], label="training")
        left.plot(numbers, [epoch.validation_loss for epoch in history], label="validation")
        left.set(xlabel="epoch", ylabel="loss of an answer", ylim=(0, None))
        right.plot(numbers, [epoch.validation_score for epoch in history], color="C1", label="validation")
        right.set(xlabel="epoch", ylabel=metric)
        for ax in (left, right):
            ax.axvline(fitted.best_epoch, color="grey", linestyle=":", label="lowest validation loss")
            ax.legend(frameon=False)


def draw_heard(path: Path, accuracy: Mapping[int, float]) -> None:
    """Accuracy against how many steps of a recording were heard."""
    with _picture(path) as (ax,):
        ax.plot(list(accuracy), list(accuracy.values()), marker=".")
        ax.set(xlabel="steps heard", ylabel="accuracy, %")
        ax.grid(alpha=0.3)


def draw_confusions(path: Path, counts: NDArray[np.int64], labels: Sequence[str]) -> None:
    """(classes, classes): a row for each class, shaded by the share of its items that were taken for the column's."""
    with _picture(path) as (ax,):
        ax.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if row == column else "black"
            ax.text(column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize="small")
        ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize="small")
        ax.set_yticks(range(len(labels)), labels, fontsize="small")
        ax.set(xlabel="taken for", ylabel="is")


class Spread(NamedTuple):
    """Some values, their mean, and how far its interval reaches to each side."""

    values: Sequence[float]
    mean: float
    half_width: float


def draw_spreads(path: Path, spreads: Mapping[str, Spread], label: str) -> None:
    """For each name the mean with its interval, and the single values as dots."""
    with _picture(path) as (ax,):
        for i, spread in enumerate(spreads.values()):
            ax.errorbar(spread.mean, i, xerr=spread.half_width, fmt="o", color="C0", capsize=4, markersize=7)
            ax.plot(spread.values, [i] * len(spread.values), "k.", markersize=4)
        ax.set_yticks(range(len(spreads)), list(spreads))
        ax.invert_yaxis()
        ax.set(xlabel=label)
        ax.grid(axis="x", alpha=0.3)


def draw_lines(path: Path, x: Sequence[float], lines: Mapping[str, Sequence[float]], x_label: str, label: str) -> None:
    """A line for each name, over the same `x`."""
    with _picture(path) as (ax,):
        for name, y in lines.items():
            ax.plot(x, y, marker=".", label=name)
        ax.set(xlabel=x_label, ylabel=label)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
