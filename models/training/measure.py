"""What is measured of a trained network beside its one number: where it errs, and how it does on a live stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.predictor import Predictor
from models.training.loss import predicted_labels
from models.training.sequences import Recording, batches, pad


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


@torch.no_grad()
def streamed_outputs(predictor: Predictor, recordings: Sequence[Recording]) -> list[Tensor]:
    """For each recording (steps, outputs): the answer after every step, as a stream gives it.

    A network that answers about a whole sequence does so about each beginning of the recording.
    """
    if predictor.network.spec.readout != "each_step":
        return [_about_beginnings(predictor, torch.from_numpy(recording.values)) for recording in recordings]
    outputs: list[Tensor] = []
    for group in batches(recordings, 64):
        batch = pad(group)
        answers = predictor.run(batch.values, batch.lengths)
        outputs += [row[:length] for row, length in zip(answers, batch.lengths.tolist(), strict=True)]
    return outputs


def _about_beginnings(predictor: Predictor, values: Tensor) -> Tensor:
    """(steps, features) -> (steps, outputs)."""
    steps = len(values)
    return predictor.run(values.expand(steps, *values.shape), torch.arange(1, steps + 1))


def measure_live(predictor: Predictor, recordings: Sequence[Recording], settling_steps: int = 0) -> Live:
    """How a network does on whole recordings; the first `settling_steps` count for `last` and `mean` only."""
    last, mean, settled = [], [], []
    for recording, outputs in zip(recordings, streamed_outputs(predictor, recordings), strict=True):
        right = outputs.argmax(dim=-1) == recording.label
        last.append(bool(right[-1]))
        mean.append(int(outputs.softmax(dim=-1).mean(dim=0).argmax()) == recording.label)
        settled += right[settling_steps:].tolist()
    return Live(_percent(last), _percent(mean), _percent(settled))


def accuracy_by_steps(predictor: Predictor, recordings: Sequence[Recording], steps: Sequence[int]) -> dict[int, float]:
    """Percent right after so many steps; a recording that has ended by then counts with its last answer."""
    outputs = streamed_outputs(predictor, recordings)
    labels = [recording.label for recording in recordings]
    return {
        n: _percent([int(o[min(n, len(o)) - 1].argmax()) == label for o, label in zip(outputs, labels, strict=True)])
        for n in steps
    }


def confusions(predictor: Predictor, recordings: Sequence[Recording]) -> list[Confusion]:
    """The mistakes, most frequent first."""
    answers = predicted_labels(predictor, recordings).tolist()
    pairs = Counter((r.label, answer) for r, answer in zip(recordings, answers, strict=True) if r.label != answer)
    return [Confusion(*pair, count) for pair, count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]


def _percent(right: Sequence[bool]) -> float:
    return 100.0 * sum(right) / len(right)
