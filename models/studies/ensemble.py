"""Several networks that write together: how much of an error is what chance made of one training?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
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

WIDER = replace(
    PRONUNCIATION,
    name="pronunciation, wider",
    network=PRONUNCIATION.network.model_copy(update={"hidden_size": 256}),
    settings=replace(PRONUNCIATION.settings, epochs=14, learning_rate=3e-3, dropout=0.2, bfloat16_products=True),
)
"""Twice as wide as the network that is shipped, and trained for longer; in bfloat16, which halves the time."""
SIZES, WIDER_SIZES = (1, 2, 4, 8), (1, 2)
"""How many networks write together."""


class Ensemble(EncoderDecoder):
    """Encoder-decoders: a label's probability is the mean of theirs, and each attends for itself.

    Hansen and Salamon, "Neural network ensembles", 1990. Memories and values are those of all networks, side by side.
    """

    def __init__(self, networks: Sequence[EncoderDecoder]) -> None:
        nn.Module.__init__(self)  # it has no weights of its own
        self.spec, self.combine = networks[0].spec, networks[0].combine
        self.networks = networks
        self._widths = [network.spec.hidden_size * network.spec.directions for network in networks]

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
        parts: tuple[Tensor, ...] = values.split(self._widths, dim=-1)
        return parts


def _side_by_side(values: Sequence[Values]) -> Values:
    return tuple(torch.cat(of_all, dim=-1) for of_all in zip(*values, strict=True))


class Together(NamedTuple):
    """The errors in sounds and in words of some networks."""

    who: str
    networks: int
    sounds: Score
    words: Score


def compare(folder: Path, seed: int) -> Path:
    """Train, and write ensemble.md and ensemble.png."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = (PRONUNCIATION, max(SIZES)), (WIDER, max(WIDER_SIZES))
    results = run_all([Job(task, Run(seed + i)) for task, networks in kinds for i in range(networks)])
    return write(folder, results[: max(SIZES)], results[max(SIZES) :], seed)


def write(folder: Path, shipped: Sequence[Result], wider: Sequence[Result], seed: int) -> Path:
    """The page and its picture, of networks as the one that is shipped and of wider ones."""
    measured = [together(who, results) for who, results in _groups(shipped, wider)]
    draw(folder / "ensemble.png", measured)
    page = folder / "ensemble.md"
    page.write_text(describe(shipped, wider, measured, seed))
    return page


def _groups(shipped: Sequence[Result], wider: Sequence[Result]) -> Iterator[tuple[str, Sequence[Result]]]:
    for sizes, results, kind in ((SIZES, shipped, "as shipped"), (WIDER_SIZES, wider, "wider")):
        yield from ((f"{networks} {kind}", results[:networks]) for networks in sizes)
    yield f"all {len(shipped) + len(wider)}", [*shipped, *wider]


def together(who: str, results: Sequence[Result]) -> Together:
    """What the networks of these trainings write together for the words of the test."""
    networks = [result.network for result in results if isinstance(result.network, EncoderDecoder)]
    answers = PredictorAnswers(Predictor(Ensemble(networks), results[0].input_spec))
    sounds, words = PRONUNCIATION.measure(answers, PRONUNCIATION.split(Run(0)).test)
    return Together(who, len(results), sounds, words)


def draw(path: Path, measured: Sequence[Together]) -> None:
    """Errors in sounds and in words, with their intervals."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("sounds", "words"), strict=True):
        scores: list[Score] = [getattr(one, name) for one in measured]
        values = [score.value for score in scores]
        below = [score.value - score.low for score in scores]
        above = [score.high - score.value for score in scores]
        axes.errorbar(values, [one.who for one in measured], xerr=(below, above), fmt="o", capsize=3)
        axes.set(xlabel=scores[0].metric)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def describe(shipped: Sequence[Result], wider: Sequence[Result], measured: Sequence[Together], seed: int) -> str:
    """The page in Markdown."""
    rows = [
        [one.who, *(f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})" for score in (one.sounds, one.words))]
        for one in measured
    ]
    width, settings = WIDER.network.hidden_size, WIDER.settings
    parts = (
        "# Ensemble: how much of an error is chance?",
        f"`python -m models compare ensemble --seed {seed}`: the network and the settings of the bundle "
        f"`pronunciation`, trained {len(shipped)} times from different beginnings, and {len(wider)} wider ones "
        f"({width} units for {PRONUNCIATION.network.hidden_size}, {settings.epochs} epochs for "
        f"{PRONUNCIATION.settings.epochs}, dropout {settings.dropout:g}). Alone those of a kind are about equally "
        "good, but they do not make the same mistakes. Together, where a label's probability is the mean of theirs and "
        "the beam search follows it, what goes away is what chance made of one training; what more of them do not take "
        "away is the network's and the data's. The price is the work of all of them for each word, so no such bundle "
        "is shipped.",
        "![errors of networks that write together](ensemble.png)",
        table(["networks together", "sounds, percent wrong", "words, percent wrong"], rows),
        f"Each alone: {_alone(shipped)}. The wider ones: {_alone(wider)}.",
        "The interval is that of drawing the words of the test anew.",
    )
    return "\n\n".join(parts) + "\n"


def _alone(results: Sequence[Result]) -> str:
    scores = [[f"{score.value:.2f}" for score in result.scores] for result in results]
    return "; ".join(f"{sounds} and {words}" for sounds, words in scores)
