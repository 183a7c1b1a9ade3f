"""What is measured of a trained network beside its one number: where it errs, and how it does on a live stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.manifest import Output
from models.training.answers import Answers
from models.training.sequences import Recording

EXAMPLES = 4


class Live(NamedTuple):
    """Whole recordings streamed from their start, in percent."""

    last: float  # recordings, by the answer after the last step
    mean: float  # recordings, by the mean of the probabilities of all steps
    settled: float  # steps, all but those before the network can have settled


class Confusion(NamedTuple):
    """How often recordings of one class were taken for another."""

    truth: int
    answer: int
    times: int


def measure_live(answers: Answers, recordings: Sequence[Recording], settling_steps: int = 0) -> Live:
    """How a network does on whole recordings; the first `settling_steps` count for `last` and `mean` only."""
    last, mean, settled = [], [], []
    for recording, outputs in zip(recordings, answers.about_steps(recordings), strict=True):
        right = outputs.argmax(dim=-1) == recording.label
        last.append(bool(right[-1]))
        mean.append(int(outputs.softmax(dim=-1).mean(dim=0).argmax()) == recording.label)
        settled += right[settling_steps:].tolist()
    return Live(_percent(last), _percent(mean), _percent(settled))


def accuracy_by_steps(answers: Answers, recordings: Sequence[Recording], steps: Sequence[int]) -> dict[int, float]:
    """Percent right after so many steps; a recording that has ended by then counts with its last answer."""
    outputs = answers.about_steps(recordings)
    labels = [recording.label for recording in recordings]
    return {
        n: _percent([int(o[min(n, len(o)) - 1].argmax()) == label for o, label in zip(outputs, labels, strict=True)])
        for n in steps
    }


def confusion_matrix(answers: Answers, recordings: Sequence[Recording], classes: int) -> NDArray[np.int64]:
    """(classes, classes): how often recordings of the row's class were taken for the column's."""
    counts = np.zeros((classes, classes), np.int64)
    taken_for = answers.about_all(recordings).argmax(dim=-1).tolist()
    np.add.at(counts, ([recording.label for recording in recordings], taken_for), 1)
    return counts


def confusions(counts: NDArray[np.int64]) -> list[Confusion]:
    """The mistakes in a matrix of them, most frequent first."""
    wrong = counts - np.diag(np.diag(counts))
    pairs = zip(*(column.tolist() for column in wrong.nonzero()), wrong[wrong > 0].tolist(), strict=True)
    return sorted((Confusion(*pair) for pair in pairs), key=lambda c: (-c.times, c.truth, c.answer))


def describe_confusions(answers: Answers, recordings: Sequence[Recording], output: Output) -> str:
    """The classes most often taken for another, in words."""
    labels = output.labels
    counts = confusion_matrix(answers, recordings, len(labels))
    errors, sizes = confusions(counts), counts.sum(axis=1)
    total = sum(error.times for error in errors)
    named = [f"{labels[e.truth]} for {labels[e.answer]} ({e.times} of {sizes[e.truth]})" for e in errors[:4]]
    often = f" Most often it takes {'; '.join(named)}." if named else ""
    return f"{total} of {len(recordings)} wrong.{often}{_examples(answers, recordings, labels)}"


def _examples(answers: Answers, recordings: Sequence[Recording], labels: Sequence[str]) -> str:
    """Some of those that are taken for another, evenly from the list."""
    taken_for = answers.about_all(recordings).argmax(dim=-1).tolist()
    wrong = [(r, answer) for r, answer in zip(recordings, taken_for, strict=True) if r.label != answer]
    some = wrong[:: max(1, len(wrong) // EXAMPLES)][:EXAMPLES]
    lines = [f"- {r.name}, {len(r.values)} steps: {labels[r.label]}, taken for {labels[answer]}" for r, answer in some]
    return "\n\nSome of them:\n\n" + "\n".join(lines) if lines else ""


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * sum(right) / len(right)
