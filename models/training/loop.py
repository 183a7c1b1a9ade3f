"""The one training loop: back-propagation through time, truncated where sequences are long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.manifest import FeatureInput, TextInput
from models.predictor import Predictor
from models.recurrent import GATES, NetworkSpec, RecurrentNetwork
from models.seq2seq import network_of
from models.training.answers import PredictorAnswers
from models.training.fused import FusedStack
from models.training.loss import loss_of
from models.training.scores import Measure, accuracy
from models.training.sequences import Batch, Recording, batches, delayed, encoded, pad

PASS_ON_BIAS = 4.0  # of the update gate, which is then 0.98


@dataclass(frozen=True)
class Settings:
    """How a network is trained."""

    epochs: int  # at most
    batch_size: int  # sequences
    learning_rate: float  # at first; falls to 0 along half a cosine
    patience: int = 0  # epochs without a better validation loss before it ends; 0 = never
    truncate_steps: int = 0  # gradients reach back no further than the piece they are in; 0 = to the start
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    dropout: float = 0.0
    input_noise: float = 0.0  # standard deviation, in units of the feature's own
    label_smoothing: float = 0.0
    average_decay: float = 0.0  # the weights kept are an exponential moving average; 0 = the last ones


class Epoch(NamedTuple):
    """What one epoch of training came to. Losses are those of an answer; NaN where there is no validation data."""

    number: int
    train_loss: float
    validation_loss: float
    validation_score: float  # what the task measures first


@dataclass
class Fitted:
    """A trained network, the epoch its weights are from (counted from 1), and the way there."""

    network: RecurrentNetwork
    best_epoch: int = 0
    history: list[Epoch] = field(default_factory=list)


def quiet(_epoch: Epoch) -> None:
    """Report nothing."""


Examples = Callable[[np.random.Generator], Sequence[Recording]]
"""Gives the sequences of one epoch: cut and varied anew each time."""


@dataclass(frozen=True)
class Lesson:
    """What a network is to learn, and how well it has."""

    spec: NetworkSpec
    input_spec: FeatureInput | TextInput
    examples: Examples
    validation: Sequence[Recording] = ()
    measure: Measure = accuracy
    look_ahead: int = 0

    def prepared(self, recordings: Sequence[Recording]) -> list[Recording]:
        """Encoded, and each label as much later as the look-ahead has it."""
        return delayed(encoded(recordings, self.input_spec), self.input_spec, self.look_ahead)


def fit(lesson: Lesson, settings: Settings, seed: int, report: Callable[[Epoch], None] = quiet) -> Fitted:
    """Train a fresh network; the weights kept are those of the lowest validation loss, or the last ones.

    The same arguments give the same weights.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = network_of(lesson.spec, dropout=settings.dropout, stack=FusedStack)
    start_orthogonal(network)
    start_shallow(network)
    trainer = Trainer(network, lesson.input_spec, settings)
    fitted, lowest = Fitted(network_of(lesson.spec)), math.inf
    for number in range(1, settings.epochs + 1):
        train_loss = trainer.run_epoch(number, lesson.prepared(lesson.examples(rng)), rng)
        kept = trainer.weights_to_keep()
        epoch = Epoch(number, train_loss, *validate(kept, lesson))
        fitted.history.append(epoch)
        report(epoch)
        if not lesson.validation or epoch.validation_loss < lowest:
            lowest = epoch.validation_loss
            fitted.network, fitted.best_epoch = kept, number
        elif settings.patience and number - fitted.best_epoch >= settings.patience:
            break
    return fitted


class Trainer:
    """A network on its way: optimiser, learning rate and moving average."""

    def __init__(self, network: RecurrentNetwork, input_spec: FeatureInput | TextInput, settings: Settings) -> None:
        self._network, self._settings = network, settings
        self._features = input_spec if isinstance(input_spec, FeatureInput) else None
        self._optimiser = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._average: AveragedModel | None = None
        if settings.average_decay:
            multi_avg_fn = get_ema_multi_avg_fn(settings.average_decay)
            self._average = AveragedModel(network, multi_avg_fn=multi_avg_fn)

    def run_epoch(self, number: int, recordings: Sequence[Recording], rng: np.random.Generator) -> float:
        """Train on the encoded sequences once; gives the mean loss of an answer."""
        self._network.train()
        total, answers = 0.0, 0
        groups = list(batches(recordings, self._settings.batch_size, rng))
        for i, group in enumerate(groups):
            self._set_learning_rate((number - 1 + i / len(groups)) / self._settings.epochs)
            batch = pad(group, self._features)
            if self._settings.input_noise:
                batch.values.add_(torch.randn_like(batch.values), alpha=self._settings.input_noise)
            for loss, count in self._run_batch(batch):
                total, answers = total + loss, answers + count
        return total / answers

    def weights_to_keep(self) -> RecurrentNetwork:
        """A network with the moving average where there is one, else with the weights of now."""
        module = self._network if self._average is None else self._average.module
        network = network_of(self._network.spec)
        network.load_state_dict(module.state_dict())
        return network.eval()

    def _set_learning_rate(self, done: float) -> None:
        """By how much of the training is done: half a cosine."""
        for group in self._optimiser.param_groups:
            group["lr"] = self._settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _run_batch(self, batch: Batch) -> list[tuple[float, int]]:
        """One update for each piece; the state goes from piece to piece, the gradient does not."""
        losses: list[tuple[float, int]] = []
        rest: Batch | None = batch
        state: Tensor | None = None
        while rest is not None:
            piece, rest, remains = rest.cut(self._settings.truncate_steps or rest.values.shape[1])
            loss, count, after = loss_of(self._network, piece, state, label_smoothing=self._settings.label_smoothing)
            if rest is not None:
                state = after.detach()[remains]
            self._update(loss / count)
            losses.append((loss.item(), count))
        return losses

    def _update(self, loss: Tensor) -> None:
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._network.parameters(), self._settings.clip_norm)
        self._optimiser.step()
        if self._average is not None:
            self._average.update_parameters(self._network)


@torch.no_grad()
def validate(network: RecurrentNetwork, lesson: Lesson) -> tuple[float, float]:
    """Mean loss of an answer about the validation part, and its first score; NaN where there is none."""
    if not lesson.validation:
        return math.nan, math.nan
    features = lesson.input_spec if isinstance(lesson.input_spec, FeatureInput) else None
    total, answers = 0.0, 0
    for group in batches(lesson.prepared(lesson.validation), 128):
        loss, count, _ = loss_of(network, pad(group, features))
        total, answers = total + loss.item(), answers + count
    predictor = Predictor(network, lesson.input_spec, look_ahead=lesson.look_ahead)
    return total / answers, lesson.measure(PredictorAnswers(predictor), lesson.validation)[0].value


def start_orthogonal(network: RecurrentNetwork) -> None:
    """Make each gate's hidden-to-hidden weights orthogonal, so that neither state nor gradient shrinks at first.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks", 2014.
    """
    for name, parameter in network.recurrent.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.detach().chunk(GATES[network.spec.cell]):
                nn.init.orthogonal_(gate)


@torch.no_grad()
def start_shallow(network: RecurrentNetwork) -> None:
    """Let the further cells of a deep GRU transition pass the state on nearly as it is at first.

    Else each of them would overwrite half of the state in every step, and what was heard would fade before the
    network has learned to keep it. Zilly et al., "Recurrent Highway Networks", 2017, start likewise.
    """
    if network.spec.cell == "gru":
        for name, parameter in network.recurrent.named_parameters():
            if name.startswith("bias_hh") and "_t" in name:
                parameter.chunk(GATES["gru"])[1].fill_(PASS_ON_BIAS)
