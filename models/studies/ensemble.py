"""Several networks that write together: how much of an error is what chance made of one training?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from models.beam import END
from models.manifest import FeatureInput, TextInput
from models.markdown import table
from models.predictor import Predictor
from models.recurrent import Values
from models.seq2seq import EncoderDecoder
from models.tasks.pronunciation import BEAM, PRONUNCIATION, rates
from models.tasks.task import Recordings, Run, Split, Task
from models.training.answers import Answers, PredictorAnswers
from models.training.runs import Job, Result, run_all
from models.training.scores import Score
from models.training.sequences import NO_LABEL, Recording, batches, encoded, pad

SIZES = (1, 2, 4, 8)
"""How many networks write together in one direction."""
CANDIDATES = 8
"""Outputs of those that write from the left, of which both directions choose."""


class Ensemble(EncoderDecoder):
    """Encoder-decoders of one shape: a label's probability is the mean of theirs, and each attends for itself.

    Hansen and Salamon, "Neural network ensembles", 1990. Memories and values are those of all networks, side by side.
    """

    def __init__(self, networks: Sequence[EncoderDecoder]) -> None:
        nn.Module.__init__(self)  # it has no weights of its own
        self.spec, self.combine = networks[0].spec, networks[0].combine
        self.networks = networks

    def teach(self, inputs: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return _mean([network.teach(inputs, lengths, labels) for network in self.networks])

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
        return _mean([network.write(of_it, its) for network, of_it, its in own])

    def _of_each(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.chunk(len(self.networks), dim=-1)


def _mean(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of the probabilities."""
    return torch.stack([of_one.softmax(dim=-1) for of_one in logits]).mean(dim=0).log()


def _side_by_side(values: Sequence[Values]) -> Values:
    return tuple(torch.cat(of_all, dim=-1) for of_all in zip(*values, strict=True))


def agreed(from_left: PredictorAnswers, from_right: EncoderDecoder, words: Recordings) -> list[tuple[int, ...]]:
    """Of what is written from the left for each word the output with the greatest product of both probabilities.

    Liu, Utiyama, Finch and Sumita, "Agreement on Target-bidirectional Neural Machine Translation", 2016.
    """
    found = from_left.hypotheses(words, replace(BEAM, beam_width=CANDIDATES, n_best=CANDIDATES))
    turned = [
        Recording(word.values, np.array([*reversed(one.labels), END]))
        for word, some in zip(words, found, strict=True)
        for one in some
    ]
    from_there = _log_probabilities(from_right, turned, from_left.predictor.input_spec)
    return [max(some, key=lambda one: one.score + next(from_there)).labels for some in found]


@torch.no_grad()
def _log_probabilities(
    network: EncoderDecoder, recordings: Recordings, input_spec: FeatureInput | TextInput
) -> Iterator[float]:
    """Of the output of each recording, by the network."""
    for group in batches(encoded(recordings, input_spec), 512):
        batch = pad(group)
        outputs = network.teach(batch.values, batch.lengths, batch.targets.clamp(min=END)).transpose(1, 2)
        losses = functional.cross_entropy(outputs, batch.targets, reduction="none", ignore_index=NO_LABEL)
        yield from (-losses.sum(dim=1)).tolist()


def backwards(task: Task) -> Task:
    """The same for a network that writes from the right, trained with bfloat16 products to be done sooner."""
    return replace(
        task,
        name=f"{task.name}, backwards",
        split=partial(_turned_split, task),
        measure=_measure_turned,
        settings=replace(task.settings, bfloat16_products=True),
    )


def _turned_split(task: Task, run: Run) -> Split:
    split = task.split(run)
    return Split(*map(_turned, (split.train, split.validation, split.test)))


def _turned(recordings: Recordings) -> Recordings:
    return [replace(one, target=np.array([*np.asarray(one.target)[-2::-1], END])) for one in recordings]


def _measure_turned(answers: Answers, words: Recordings) -> tuple[Score, ...]:
    return rates([labels[::-1] for labels in answers.written(words, BEAM)], words)


class Together(NamedTuple):
    """The errors in sounds and in words of so many networks."""

    networks: int
    both_ends: bool  # half of them write from the right
    sounds: Score
    words: Score


def compare(folder: Path, seed: int) -> Path:
    """Train, and write ensemble.md and ensemble.png."""
    folder.mkdir(parents=True, exist_ok=True)
    most = max(SIZES)
    tasks = (PRONUNCIATION, backwards(PRONUNCIATION))
    results = run_all([Job(task, Run(seed + i)) for task in tasks for i in range(most)])
    return write(folder, results[:most], results[most:], seed)


def write(folder: Path, from_left: Sequence[Result], from_right: Sequence[Result], seed: int) -> Path:
    """The page and the picture of what came of the trainings."""
    measured = [
        *(together(from_left[:networks]) for networks in SIZES),
        *(together(from_left[:networks], from_right[:networks]) for networks in SIZES),
    ]
    draw(folder / "ensemble.png", measured)
    page = folder / "ensemble.md"
    page.write_text(describe(from_left, from_right, measured, seed))
    return page


def together(from_left: Sequence[Result], from_right: Sequence[Result] = ()) -> Together:
    """What the networks of these trainings write together for the words of the test."""
    test = PRONUNCIATION.split(Run(0)).test
    answers = PredictorAnswers(Predictor(_ensemble(from_left), from_left[0].input_spec))
    written = agreed(answers, _ensemble(from_right), test) if from_right else answers.written(test, BEAM)
    return Together(len(from_left) + len(from_right), bool(from_right), *rates(written, test))


def _ensemble(results: Sequence[Result]) -> Ensemble:
    return Ensemble([result.network for result in results if isinstance(result.network, EncoderDecoder)])


def draw(path: Path, measured: Sequence[Together]) -> None:
    """Errors in sounds and in words against the number of networks, with their intervals."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, scores_of in zip(figure.subplots(1, 2), (attrgetter("sounds"), attrgetter("words")), strict=True):
        for both_ends, label in ((False, "all from the left"), (True, "half from the right")):
            own = [one for one in measured if one.both_ends == both_ends]
            values = [scores_of(one).value for one in own]
            below = [scores_of(one).value - scores_of(one).low for one in own]
            above = [scores_of(one).high - scores_of(one).value for one in own]
            axes.errorbar([one.networks for one in own], values, (below, above), marker="o", capsize=3, label=label)
        axes.set(
            xlabel="networks", ylabel=scores_of(measured[0]).metric, xticks=sorted({one.networks for one in measured})
        )
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def describe(from_left: Sequence[Result], from_right: Sequence[Result], measured: Sequence[Together], seed: int) -> str:
    """The page in Markdown."""
    header = ["networks", "that write", "sounds, percent wrong", "words, percent wrong"]
    rows = [
        [
            str(one.networks),
            "half from the right" if one.both_ends else "from the left",
            *(f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})" for score in (one.sounds, one.words)),
        ]
        for one in measured
    ]
    parts = (
        "# Ensemble: how much of an error is chance?",
        f"`python -m models compare ensemble --seed {seed}`: the network and the settings of the bundle "
        f"`pronunciation`, trained {len(from_left)} times from different beginnings, and as often to write the sounds "
        "from the last to the first. Alone they are about equally good, but they do not make the same mistakes. "
        "Together, where a label's probability is the mean of theirs and the beam search follows it, what goes away "
        "is what chance made of one training. Those that write from the right are given the "
        f"{CANDIDATES} best outputs of those that write from the left, and the two probabilities of an output are "
        "multiplied: a network that has written a wrong sound believes it from there on, and one that comes from the "
        "other end does not. The price is the work of all of them for each word, so no such bundle is shipped.",
        "![errors against the number of networks](ensemble.png)",
        table(header, rows),
        f"Each alone, from the left: {_alone(from_left)}. From the right: {_alone(from_right)}.",
        "The interval is that of drawing the words of the test anew.",
    )
    return "\n\n".join(parts) + "\n"


def _alone(results: Sequence[Result]) -> str:
    scores = [[f"{score.value:.2f}" for score in result.scores] for result in results]
    return "; ".join(f"{sounds} and {words}" for sounds, words in scores)
