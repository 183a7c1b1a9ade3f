"""Beam search for the most probable output of an encoder-decoder; with a width of 1 it is greedy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

END = 0
"""The label that means the end of an output; as the label before the first one it means the beginning."""
MAX_BEAM_WIDTH = 16


@dataclass(frozen=True)
class Decoding:
    """How an output is searched for."""

    max_labels: int
    beam_width: int = 1
    n_best: int = 1
    length_penalty: float = 0.0
    attention: bool = False


class Hypothesis(NamedTuple):
    """An output, its labels without the end."""

    labels: tuple[int, ...]
    score: float
    is_cut: bool
    """It has as many labels as it may have, and no end."""
    attention: Floats | None
    """(labels, steps): how much each attends to each step of the input; None unless asked for."""


class _Label(NamedTuple):
    """What was written at one place, of each path that is followed from there on."""

    parents: list[int]  # paths at the place before
    labels: list[int]
    attention: Floats | None  # (paths, steps)


class _Ended(NamedTuple):
    places: int
    path: int  # at the last of these places
    score: float
    is_cut: bool


class Beam:
    """The paths that are followed for one input, and those that have ended.

    In each turn the best `beam_width` continuations of all paths count: those that end are kept aside, and the next
    best take their places. It is over when `beam_width` have ended, or at `max_labels`.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.is_over = False
        self.decoding = decoding
        self._places: list[_Label] = []
        self._log_probabilities = [0.0]  # of each path
        self._ended: list[_Ended] = []
        self._no_attention: Floats | None = None

    @property
    def last_labels(self) -> list[int]:
        """Of each path that is followed."""
        return self._places[-1].labels if self._places else [END]

    def advance(self, log_probabilities: Floats, labels: NDArray[np.int64], attention: Floats | None) -> list[int]:
        """One label more: the numbers of the paths that those followed from now on continue.

        log_probabilities and labels (paths, candidates): the best of each, at least `beam_width` besides the end;
        attention (paths, steps) of these labels, where it is asked for.
        """
        width, length = self.decoding.beam_width, len(self._places) + 1
        scores = np.array(self._log_probabilities)[:, None] + log_probabilities
        if attention is not None:
            self._no_attention = attention[:0].copy()
        following: list[tuple[int, int, float]] = []
        order = np.argsort(-scores, axis=None, kind="stable")
        for rank, (parent, candidate) in enumerate(zip(*np.unravel_index(order, scores.shape), strict=True)):
            if len(following) == width:
                break
            label, score = int(labels[parent, candidate]), float(scores[parent, candidate])
            if label != END:
                following.append((int(parent), label, score))
            elif rank < width:
                self._end(length - 1, int(parent), score, length, is_cut=False)
        parents = [parent for parent, _, _ in following]
        kept = None if attention is None else attention[parents]  # a copy, which does not keep that of others
        self._places.append(_Label(parents, [label for _, label, _ in following], kept))
        self._log_probabilities = [score for _, _, score in following]
        if length >= self.decoding.max_labels or not all(map(math.isfinite, self._log_probabilities)):
            for path, score in enumerate(self._log_probabilities):
                self._end(length, path, score, length, is_cut=True)
            self.is_over = True
        self.is_over |= len(self._ended) >= width
        return parents

    def hypotheses(self) -> list[Hypothesis]:
        """The best first."""
        best = sorted(self._ended, key=lambda ended: -ended.score)[: self.decoding.n_best]
        return [self._traced_back(ended) for ended in best]

    def _end(self, places: int, path: int, log_probability: float, length: int, *, is_cut: bool) -> None:
        score = log_probability / length**self.decoding.length_penalty
        self._ended.append(_Ended(places, path, score, is_cut))

    def _traced_back(self, ended: _Ended) -> Hypothesis:
        path, labels, attention = ended.path, list[int](), list[Floats]()
        for place in reversed(self._places[: ended.places]):
            labels.append(place.labels[path])
            if place.attention is not None:
                attention.append(place.attention[path])
            path = place.parents[path]
        rows = np.stack(attention[::-1]) if attention else self._no_attention
        return Hypothesis(tuple(labels[::-1]), ended.score, ended.is_cut, rows)
