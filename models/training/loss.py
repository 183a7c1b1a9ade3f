"""What training minimises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from models.beam import END
from models.recurrent import RecurrentNetwork
from models.seq2seq import EncoderDecoder
from models.training.sequences import NO_LABEL, Batch


def loss_of(
    network: RecurrentNetwork, batch: Batch, state: Tensor | None = None, *, label_smoothing: float = 0.0
) -> tuple[Tensor, int, Tensor]:
    """The sum of the losses of all answers, how many answers that are, and the state after the batch.

    Cross-entropy for labels, half of the squared error for real numbers.
    """
    if isinstance(network, EncoderDecoder):
        outputs = network.teach(batch.values, batch.lengths, batch.targets.clamp(min=END))
        return *_of_labels(outputs, batch.targets, label_smoothing), torch.empty(0)
    outputs, after = network(batch.values, batch.lengths, state)
    return *sequence_loss(outputs, batch, label_smoothing=label_smoothing), after


def sequence_loss(outputs: Tensor, batch: Batch, *, label_smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Of outputs (batch, steps, outputs), one answer a step and none behind a row's length, or (batch, outputs).

    A target for the whole sequence is that of each answer about it.
    """
    targets = batch.targets
    if outputs.dim() == 3:
        live = live_steps(batch)
        outputs = outputs[live]
        targets = (targets if targets.dim() == 2 else targets.unsqueeze(1).expand_as(live))[live]
    if targets.is_floating_point():
        return 0.5 * (outputs.squeeze(-1) - targets).square().sum(), len(targets)
    return _of_labels(outputs, targets, label_smoothing)


def _of_labels(outputs: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, int]:
    flat, labels = outputs.flatten(0, -2), labels.flatten()
    total = functional.cross_entropy(flat, labels, reduction="sum", label_smoothing=smoothing, ignore_index=NO_LABEL)
    return total, int((labels != NO_LABEL).sum())


def live_steps(batch: Batch) -> Tensor:
    """(batch, steps): which steps are no padding."""
    return torch.arange(batch.values.shape[1]) < batch.lengths.unsqueeze(1)
