"""What training minimises, and the accuracy that is reported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from models.predictor import Predictor
from models.training.sequences import Batch, Recording, batches, pad


def sequence_loss(outputs: Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """The sum of the cross-entropies of all answers, and how many answers that are.

    outputs (batch, steps, outputs), one answer a step and none behind a row's length, or (batch, outputs).
    """
    labels = batch.labels
    if outputs.dim() == 3:
        live = live_steps(batch)
        outputs, labels = outputs[live], labels.unsqueeze(1).expand_as(live)[live]
    total = functional.cross_entropy(outputs, labels, reduction="sum", label_smoothing=label_smoothing)
    return total, len(labels)


def live_steps(batch: Batch) -> Tensor:
    """(batch, steps): which steps are no padding."""
    return torch.arange(batch.values.shape[1]) < batch.lengths.unsqueeze(1)


def last_answers(outputs: Tensor, lengths: Tensor) -> Tensor:
    """(batch, steps, outputs) or (batch, outputs) -> (batch, outputs): the answer when the sequence has ended."""
    return outputs[torch.arange(len(lengths)), lengths - 1] if outputs.dim() == 3 else outputs


@torch.no_grad()
def final_outputs(predictor: Predictor, recordings: Sequence[Recording], batch_size: int = 128) -> Tensor:
    """(recordings, outputs): what the network says of each recording after its last step."""
    answers = []
    for group in batches(recordings, batch_size):
        batch = pad(group)
        answers.append(last_answers(predictor.run(batch.values, batch.lengths), batch.lengths))
    return torch.cat(answers)


def predicted_labels(predictor: Predictor, recordings: Sequence[Recording]) -> Tensor:
    """(recordings,) int64."""
    return final_outputs(predictor, recordings).argmax(dim=-1)


def accuracy_percent(predictor: Predictor, recordings: Sequence[Recording]) -> float:
    """How many recordings in a hundred are labelled rightly after their last step."""
    truth = torch.tensor([recording.label for recording in recordings])
    return 100.0 * int((predicted_labels(predictor, recordings) == truth).sum()) / len(recordings)
