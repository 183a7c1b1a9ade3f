"""What a task says of itself; training, evaluation and the command line know no more of it than this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models.generation import Generation
from models.manifest import DataSource, FeatureInput, MissingValues, Output, Pattern, TextInput
from models.recurrent import NetworkSpec
from models.training.answers import Answers
from models.training.loop import Settings
from models.training.measure import describe_confusions
from models.training.scores import Measure, accuracy
from models.training.sequences import Recording

Recordings = Sequence[Recording]


class Run(NamedTuple):
    """One training of a task: its seed and, for a task with folds, the groups held out as its test."""

    seed: int
    held_out: tuple[int, ...] = ()

    def __str__(self) -> str:
        """`seed 0`, or `people 9 and 10 held out`."""
        return f"people {' and '.join(map(str, self.held_out))} held out" if self.held_out else f"seed {self.seed}"


class Split(NamedTuple):
    """Validation is part of the data given for training; the test is looked at by the final run alone."""

    train: Recordings
    validation: Recordings
    test: Recordings


def the_same(recordings: Recordings, _rng: np.random.Generator | None = None) -> Recordings:
    """Recordings as they are."""
    return recordings


@dataclass(frozen=True)
class Numbers:
    """Steps of numbers; their normalisation comes from the training data."""

    feature_names: tuple[str, ...]
    steps_per_second: float
    missing_values: MissingValues = "refuse"

    def __call__(self, recordings: Recordings) -> FeatureInput:
        """The input of a network that is trained on these recordings."""
        steps = np.concatenate([recording.numbers for recording in recordings]).astype(np.float64)
        return FeatureInput(
            feature_names=self.feature_names,
            mean=tuple(steps.mean(axis=0).tolist()),
            std=tuple(steps.std(axis=0).tolist()),
            missing_values=self.missing_values,
            steps_per_second=self.steps_per_second,
        )


@dataclass(frozen=True)
class Alphabet:
    """Steps of symbols that are known beforehand."""

    spec: TextInput

    def __call__(self, _recordings: Recordings) -> TextInput:
        """The same whatever the network is trained on."""
        return self.spec


@dataclass(frozen=True)
class Words:
    """What the model card says in words; whatever can be measured is measured instead."""

    purpose: str
    data: str
    training: str
    references: str
    limits: str


@dataclass(frozen=True)
class Task:
    """Real data, a network, and how well the one did on the other."""

    name: str
    summary: str
    pattern: Pattern
    network: NetworkSpec
    settings: Settings
    input: Callable[[Recordings], FeatureInput | TextInput]  # made from what training sees
    output: Output
    source: DataSource
    split: Callable[[Run], Split]
    runs: Callable[[int], tuple[Run, ...]]  # for a seed; the first one's weights are shipped
    repeats_over: str
    test_items: str  # in words
    samples: Callable[[Recordings], Recordings]  # what ships with the bundle, given the test recordings
    words: Words
    examples: Callable[[Recordings, np.random.Generator], Recordings] = the_same  # the sequences of one epoch
    items: Callable[[Recordings], Recordings] = the_same  # what is scored
    measure: Measure = accuracy
    errors: Callable[[Answers, Recordings, Output], str] = describe_confusions  # in words, with examples
    look_ahead: int = 0  # of the bundle; training asks for each label so many steps later
    generation: Generation | None = None  # of one-to-many
    heard_steps: tuple[int, ...] = ()  # after how many steps to measure, for a network that streams
    settling_steps: int = 0  # what a live stream is given before its steps are scored; 0 = there are no live streams
    is_long: bool = False  # trained once, by all cores, and its curves are of that: the validation part is left out
    half_precision: bool = (
        False  # weights rounded to float16 before they are scored, so that a bundle takes half the room
    )
