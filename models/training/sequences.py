"""Recordings, and batches of them padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.manifest import FeatureInput


@dataclass(frozen=True)
class Recording:
    """A labelled sequence in the units of its sensor."""

    values: NDArray[np.float32]  # (steps, features)
    label: int
    name: str = ""
    group: int = 0  # what a split must not cut through, e.g. the person


@dataclass(frozen=True)
class Batch:
    """Sequences of different lengths: values (batch, steps, features), lengths and labels (batch,) int64."""

    values: Tensor
    lengths: Tensor
    labels: Tensor

    def cut(self, steps: int) -> tuple[Batch, Batch | None, Tensor]:
        """The first steps, what remains (None if nothing), and the mask (batch,) of the rows that remain."""
        first = Batch(self.values[:, :steps], self.lengths.clamp(max=steps), self.labels)
        remains = self.lengths > steps
        if not bool(remains.any()):
            return first, None, remains
        rest = Batch(self.values[remains, steps:], self.lengths[remains] - steps, self.labels[remains])
        return first, rest, remains


def pad(recordings: Sequence[Recording], input_spec: FeatureInput | None = None) -> Batch:
    """One batch; with `input_spec` the values are normalised by its mean and standard deviation."""
    lengths = torch.tensor([len(recording.values) for recording in recordings])
    values = torch.zeros(len(recordings), int(lengths.max()), recordings[0].values.shape[1])
    for row, recording in zip(values, recordings, strict=True):
        row[: len(recording.values)] = torch.from_numpy(recording.values)
    if input_spec is not None:
        values = (values - torch.tensor(input_spec.mean)) / torch.tensor(input_spec.std)
    return Batch(values, lengths, torch.tensor([recording.label for recording in recordings]))


def batches(
    recordings: Sequence[Recording], size: int, rng: np.random.Generator | None = None
) -> Iterator[list[Recording]]:
    """In the given order, or with `rng` in a random one with sequences of like length together."""
    if rng is None:
        yield from (list(recordings[i : i + size]) for i in range(0, len(recordings), size))
        return
    order = sorted(rng.permutation(len(recordings)), key=lambda i: len(recordings[i].values))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    for g in rng.permutation(len(groups)):
        yield [recordings[i] for i in groups[g]]
