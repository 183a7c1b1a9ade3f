"""From what a network says about the next symbol to the one that is drawn. In float64, and pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """Which symbols may be drawn, and how often each is; the filters act in this order."""

    temperature: float = 1.0
    """What the logits are divided by; 0 = always the most probable symbol."""
    top_k: int = 0
    """Only of so many, the most probable ones; 0 = of all."""
    top_p: float = 1.0
    """Only of the fewest that are together as probable as this (Holtzman et al., "The Curious Case of Neural Text
    Degeneration", 2020); 1 = of all."""


def log_probabilities(logits: NDArray[np.float32]) -> Doubles:
    """(symbols,) -> (symbols,): of each under the model, before temperature and filters."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def choose(log_probabilities: Doubles, sampling: Sampling, uniform: float) -> int:
    """The number of a symbol: the inverse of the distribution function, in the order of the symbols, at `uniform`.

    0 <= uniform < 1. Of equally probable ones the first counts as the more probable.
    """
    if sampling.temperature == 0:
        return int(log_probabilities.argmax())
    with np.errstate(over="ignore"):  # next to 0 degrees all but the best are infinitely improbable
        weights = np.exp((log_probabilities - log_probabilities.max()) / sampling.temperature)
    if sampling.top_k or sampling.top_p < 1:
        weights[_left_out(weights, sampling)] = 0.0
    up_to = weights.cumsum()
    return min(int(up_to.searchsorted(uniform * up_to[-1], "right")), int(np.flatnonzero(weights)[-1]))


def _left_out(weights: Doubles, sampling: Sampling) -> NDArray[np.intp]:
    """The numbers of the symbols that the filters leave out."""
    order = np.argsort(-weights, kind="stable")
    kept = sampling.top_k or len(order)
    if sampling.top_p < 1:
        up_to = weights[order[:kept]].cumsum()
        kept = int(up_to.searchsorted(sampling.top_p * up_to[-1], "left")) + 1
    return order[kept:]
