"""How good a network is on held-out data, each number with an interval that holds the truth 95 times in a hundred."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.training.answers import Answers
from models.training.sequences import Recording

TWO_SIDED_95 = 1.96  # standard deviations of a normal distribution
RESAMPLES = 1_000


class Score(NamedTuple):
    """One number about so many items, and the ends of its interval."""

    metric: str  # a percentage if it ends in "percent"
    value: float
    items: int
    low: float
    high: float


Measure = Callable[[Answers, Sequence[Recording]], tuple[Score, ...]]
"""What a task measures; the first score is the one that a bundle states."""


def percent(metric: str, right: int, of: int) -> Score:
    """A share of independent items. Wilson, "Probable inference, the law of succession, and inference", 1927."""
    z2, share = TWO_SIDED_95**2, right / of
    centre, half = share + z2 / (2 * of), TWO_SIDED_95 * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    ends = ((centre + sign * half) / (1 + z2 / of) for sign in (-1, 1))
    return Score(metric, 100 * share, of, *(100 * end for end in ends))


def ratio(metric: str, parts: ArrayLike, wholes: ArrayLike, factor: float = 1.0) -> Score:
    """The sum of `parts` over that of `wholes`, of sequences whose items are not independent of each other.

    The interval is by drawing sequences anew. Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    above, below = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    draws = np.random.default_rng(0).integers(len(above), size=(RESAMPLES, len(above)))
    low, high = np.percentile(above[draws].sum(axis=1) / below[draws].sum(axis=1), (2.5, 97.5))
    value = above.sum() / below.sum()
    return Score(metric, float(factor * value), int(below.sum()), float(factor * low), float(factor * high))


def correlation(metric: str, answers: NDArray[np.float32], truth: NDArray[np.float32]) -> Score:
    """Pearson's r, with the interval of Fisher, "On the probable error of a coefficient of correlation", 1921."""
    r, items = float(np.corrcoef(answers, truth)[0, 1]), len(truth)
    z = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    half = TWO_SIDED_95 / math.sqrt(items - 3)
    return Score(metric, r, items, math.tanh(z - half), math.tanh(z + half))


def accuracy(answers: Answers, recordings: Sequence[Recording], metric: str = "accuracy, percent") -> tuple[Score]:
    """How many recordings in a hundred are labelled rightly after their last step."""
    found = answers.about_all(recordings).argmax(dim=-1).tolist()
    right = sum(label == recording.label for label, recording in zip(found, recordings, strict=True))
    return (percent(metric, right, len(recordings)),)
