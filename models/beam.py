"""Beam search for the most probable output of an encoder-decoder; with a width of 1 it is greedy."""

from __future__ import annotations

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
    attention: Floats | None
    """(labels, steps): how much each attends to each step of the input; None unless asked for."""


class _Path(NamedTuple):
    labels: tuple[int, ...]
    log_probability: float
    attention: tuple[Floats, ...]


class Beam:
    """The paths that are followed for one input, and those that have ended.

    In each turn the best `beam_width` continuations of all paths count: those that end are kept aside, and the next
    best take their places. It is over when `beam_width` have ended, or at `max_labels`.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.is_over = False
        self.decoding = decoding
        self._paths = [_Path((), 0.0, ())]
        self._ended: list[Hypothesis] = []
        self._no_attention = np.empty((0, 0), np.float32)

    @property
    def last_labels(self) -> list[int]:
        """Of each path that is followed."""
        return [path.labels[-1] if path.labels else END for path in self._paths]

    def advance(self, log_probabilities: Floats, labels: NDArray[np.int64], attention: Floats | None) -> list[int]:
        """One label more: the numbers of the paths that those followed from now on continue.

        log_probabilities and labels (paths, candidates): the best of each, at least `beam_width` besides the end;
        attention (paths, steps) of these labels, where it is asked for.
        """
        width, paths = self.decoding.beam_width, self._paths
        if attention is not None:
            self._no_attention = attention[:0]
        scores = np.array([path.log_probability for path in paths])[:, None] + log_probabilities
        order = np.argsort(-scores, axis=None, kind="stable")
        parents: list[int] = []
        self._paths = []
        for rank, (parent, candidate) in enumerate(zip(*np.unravel_index(order, scores.shape), strict=True)):
            if len(self._paths) == width:
                break
            path, label = paths[parent], int(labels[parent, candidate])
            looked = path.attention if attention is None else (*path.attention, attention[parent])
            if label != END:
                self._paths.append(_Path((*path.labels, label), float(scores[parent, candidate]), looked))
                parents.append(int(parent))
            elif rank < width:
                self._end(_Path(path.labels, float(scores[parent, candidate]), path.attention), len(path.labels) + 1)
        if len(self._paths[0].labels) >= self.decoding.max_labels:
            for path in self._paths:
                self._end(path, len(path.labels))
            self.is_over = True
        self.is_over |= len(self._ended) >= width
        return parents

    def hypotheses(self) -> list[Hypothesis]:
        """The best first."""
        return sorted(self._ended, key=lambda ended: -ended.score)[: self.decoding.n_best]

    def _end(self, path: _Path, length: int) -> None:
        score = path.log_probability / length**self.decoding.length_penalty
        attention = None
        if self.decoding.attention:
            attention = np.stack(path.attention) if path.attention else self._no_attention
        self._ended.append(Hypothesis(path.labels, score, attention))
