"""Recordings, and batches of them padded to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.manifest import FeatureInput, TextInput

Values = NDArray[np.float32] | NDArray[np.int64]
Target = int | float | NDArray[np.int64]
NO_LABEL = -100
"""At a place where nothing is asked for; what `cross_entropy` leaves out."""


@dataclass(frozen=True)
class Recording:
    """A sequence and what a network shall make of it."""

    values: Values | str
    """(steps, features) in the units of the sensor, or a text, or (steps,) numbers of its symbols."""
    target: Target
    """The number of a label; or a real number; or (steps,) labels, one a step; or (labels,) that a decoder writes."""
    name: str = ""
    group: int = 0  # what a split must not cut through, e.g. the person

    @property
    def numbers(self) -> NDArray[np.float32]:
        """(steps, features) of a recording that is no text. Raises TypeError for any other."""
        if isinstance(self.values, str) or self.values.dtype != np.float32:
            raise TypeError(f"{self.name or 'the recording'} is a text")
        return np.asarray(self.values, dtype=np.float32)

    @property
    def label(self) -> int:
        """Of a recording that has one for all of it. Raises TypeError for any other."""
        if not isinstance(self.target, int):
            raise TypeError(f"{self.name or 'the recording'} has no single label")
        return self.target


@dataclass(frozen=True)
class Batch:
    """Sequences of different lengths: values (batch, steps, features) or (batch, steps), lengths (batch,) int64.

    targets (batch,) int64 or float32, or (batch, labels) int64 with NO_LABEL behind the last.
    """

    values: Tensor
    lengths: Tensor
    targets: Tensor

    def cut(self, steps: int) -> tuple[Batch, Batch | None, Tensor]:
        """The first steps, what remains (None if nothing), and the mask (batch,) of the rows that remain."""
        one_a_step = self.targets.dim() == 2
        targets, later = (self.targets[:, :steps], self.targets[:, steps:]) if one_a_step else [self.targets] * 2
        first = Batch(self.values[:, :steps], self.lengths.clamp(max=steps), targets)
        remains = self.lengths > steps
        if not bool(remains.any()):
            return first, None, remains
        rest = Batch(self.values[remains, steps:], self.lengths[remains] - steps, later[remains])
        return first, rest, remains


def encoded(recordings: Sequence[Recording], input_spec: FeatureInput | TextInput) -> list[Recording]:
    """The same with the numbers of symbols for texts, by the codec that serves them. Raises UnknownSymbolError."""
    if isinstance(input_spec, FeatureInput):
        return list(recordings)
    return [replace(r, values=input_spec.encode(r.values)) if isinstance(r.values, str) else r for r in recordings]


def delayed(recordings: Sequence[Recording], input_spec: FeatureInput | TextInput, look_ahead: int) -> list[Recording]:
    """Encoded recordings as a network learns them whose answers come so many steps later: padding behind each of them,
    as in serving, and nothing asked for at its first steps. Raises TypeError for targets that are no labels.
    """
    if not look_ahead:
        return list(recordings)
    padding, silence = input_spec.behind_the_end(look_ahead), np.full(look_ahead, NO_LABEL)
    late = list[Recording]()
    for recording in recordings:
        if isinstance(recording.values, str) or isinstance(recording.target, float):
            raise TypeError("a look-ahead is for labels about encoded recordings")
        labels = np.broadcast_to(recording.target, len(recording.values))
        values = np.concatenate([recording.values, padding])
        late.append(replace(recording, values=values, target=np.concatenate([silence, labels])))
    return late


def pad(recordings: Sequence[Recording], input_spec: FeatureInput | None = None) -> Batch:
    """One batch of encoded recordings; with `input_spec` numbers are normalised by its mean and standard deviation."""
    rows = [torch.from_numpy(recording.values) for recording in recordings if not isinstance(recording.values, str)]
    if len(rows) < len(recordings):
        raise TypeError("a text must be encoded first")
    values = pad_sequence(rows, batch_first=True)
    if input_spec is not None:
        values = (values - torch.tensor(input_spec.mean)) / torch.tensor(input_spec.std)
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(values, lengths, _padded([recording.target for recording in recordings]))


def _padded(targets: list[Target]) -> Tensor:
    rows = [torch.from_numpy(target) for target in targets if isinstance(target, np.ndarray)]
    return pad_sequence(rows, batch_first=True, padding_value=NO_LABEL) if rows else torch.tensor(targets)


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
