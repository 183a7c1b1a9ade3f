"""Several networks that write together: how much of an error is what chance made of one training?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from models.markdown import table
from models.predictor import Predictor
from models.recurrent import Values
from models.seq2seq import EncoderDecoder
from models.tasks.pronunciation import PRONUNCIATION
from models.tasks.task import Run
from models.training.answers import PredictorAnswers
from models.training.runs import Job, Result, run_all
from models.training.scores import Score

SIZES = (1, 2, 4, 8)
"""How many networks write together."""


class Ensemble(EncoderDecoder):
    """Encoder-decoders of one shape: a label's probability is the mean of theirs, and each attends for itself.

    Hansen and Salamon, "Neural network ensembles", 1990. Memories and values are those of all networks, side by side.
    """

    def __init__(self, networks: Sequence[EncoderDecoder]) -> None:
        nn.Module.__init__(self)  # it has no weights of its own
        self.spec, self.combine = networks[0].spec, networks[0].combine
        self.networks = networks

    def remember(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat([network.remember(inputs, lengths) for network in self.networks], dim=-1)

    def ends_of(self, memory: Tensor) -> Tensor:
        own = zip(self.networks, self._of_each(memory), strict=True)
        return torch.cat([network.ends_of(part) for network, part in own], dim=-1)

    def first_values(self, ends: Tensor) -> Values:
        own = zip(self.networks, self._of_each(ends), strict=True)
        return _side_by_side([network.first_values(part) for network, part in own])

    def step(self, labels: Tensor, values: Values) -> Values:
        own = zip(self.networks, *map(self._of_each, values), strict=True)
        return _side_by_side([network.step(labels, parts) for network, *parts in own])

    def attend(self, states: Tensor, memory: Tensor, is_step: Tensor) -> tuple[Tensor, Tensor]:
        own = zip(self.networks, self._of_each(states), self._of_each(memory), strict=True)
        contexts, weights = _side_by_side([network.attend(of_it, its, is_step) for network, of_it, its in own])
        return contexts, torch.stack(weights.chunk(len(self.networks), dim=-1)).mean(dim=0)

    def write(self, states: Tensor, contexts: Tensor) -> Tensor:
        own = zip(self.networks, self._of_each(states), self._of_each(contexts), strict=True)
        probabilities = [network.write(of_it, its).softmax(dim=-1) for network, of_it, its in own]
        return torch.stack(probabilities).mean(dim=0).log()

    def _of_each(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.chunk(len(self.networks), dim=-1)


def _side_by_side(values: Sequence[Values]) -> Values:
    return tuple(torch.cat(of_all, dim=-1) for of_all in zip(*values, strict=True))


class Together(NamedTuple):
    """The errors in sounds and in words of so many networks."""

    networks: int
    sounds: Score
    words: Score


def compare(folder: Path, seed: int) -> Path:
    """Train, and write ensemble.md and ensemble.png."""
    folder.mkdir(parents=True, exist_ok=True)
    results = run_all([Job(PRONUNCIATION, Run(seed + i)) for i in range(max(SIZES))])
    measured = [together(results[:networks]) for networks in SIZES]
    draw(folder / "ensemble.png", measured)
    page = folder / "ensemble.md"
    page.write_text(describe(results, measured, seed))
    return page


def together(results: Sequence[Result]) -> Together:
    """What the networks of these trainings write together for the words of the test."""
    networks = [result.network for result in results if isinstance(result.network, EncoderDecoder)]
    answers = PredictorAnswers(Predictor(Ensemble(networks), results[0].input_spec))
    sounds, words = PRONUNCIATION.measure(answers, PRONUNCIATION.split(Run(0)).test)
    return Together(len(results), sounds, words)


def draw(path: Path, measured: Sequence[Together]) -> None:
    """Errors in sounds and in words against the number of networks, with their intervals."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    numbers = [one.networks for one in measured]
    for axes, scores in zip(
        figure.subplots(1, 2), ([one.sounds for one in measured], [one.words for one in measured]), strict=True
    ):
        values = [score.value for score in scores]
        below = [score.value - score.low for score in scores]
        above = [score.high - score.value for score in scores]
        axes.errorbar(numbers, values, (below, above), marker="o", capsize=3)
        axes.set(xlabel="networks", ylabel=scores[0].metric, xticks=numbers)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def describe(results: Sequence[Result], measured: Sequence[Together], seed: int) -> str:
    """The page in Markdown."""
    header = ["", "sounds, percent wrong", "words, percent wrong"]
    rows = [
        [
            f"{one.networks} together" if one.networks > 1 else "the first",
            *(f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})" for score in (one.sounds, one.words)),
        ]
        for one in measured
    ]
    alone = [[f"{score.value:.2f}" for score in result.scores] for result in results]
    parts = (
        "# Ensemble: how much of an error is chance?",
        f"`python -m models compare ensemble --seed {seed}`: the network and the settings of the bundle "
        f"`pronunciation`, trained {len(results)} times from different beginnings. Alone they are about equally good, "
        "but they do not make the same mistakes. Together, where a label's probability is the mean of theirs and the "
        "beam search follows it, what goes away is what chance made of one training; what more of them do not take "
        "away is the network's and the data's. The price is the work of all of them for each word, so no such bundle "
        "is shipped.",
        "![errors against the number of networks](ensemble.png)",
        table(header, rows),
        "Each alone: " + "; ".join(f"{sounds} and {words}" for sounds, words in alone) + ".",
        "The interval is that of drawing the words of the test anew. How many networks there would be was decided "
        "before the first look at the test.",
    )
    return "\n\n".join(parts) + "\n"
