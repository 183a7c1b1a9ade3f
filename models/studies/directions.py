"""Forward and bidirectional: what right context buys, and how much of a sequence must be heard for an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.manifest import FeatureInput, TextInput
from models.recurrent import NetworkSpec
from models.studies.variants import Measured, Variants, as_large_as, half_as_long, shallow, write_page
from models.tasks import sentiment, speaker
from models.tasks.activity import ACTIVITY
from models.tasks.task import Task
from models.training.card import parameters_of
from models.training.plots import draw_lines
from models.training.sequences import Recording

SHARES = tuple(percent / 100 for percent in range(10, 101, 10))


def forward_beside(task: Task, bidirectional: NetworkSpec) -> Task:
    """The task with one forward layer of the same cell, about as large as the bidirectional network."""
    plain = bidirectional.model_copy(update={"direction": "forward", "readout": "each_step"})
    return replace(task, network=as_large_as(plain, parameters_of(bidirectional)))


def directions() -> dict[str, Variants]:
    """For each task both, each trained as the bundle of its direction is; of `activity` there is none but forward."""
    plain = shallow(ACTIVITY.network)
    both_ways = plain.model_copy(update={"direction": "bidirectional", "readout": "mean"})
    whole = replace(
        ACTIVITY,
        network=as_large_as(both_ways, parameters_of(plain)),
        settings=replace(ACTIVITY.settings, truncate_steps=0),
        settling_steps=0,
    )
    pairs = {
        "speaker": (speaker.SPEAKER, speaker.BIDIRECTIONAL),
        "sentiment": (half_as_long(sentiment.SENTIMENT), half_as_long(sentiment.BIDIRECTIONAL)),
        "activity": (half_as_long(ACTIVITY), half_as_long(whole)),
    }
    return {
        name: {"forward": forward_beside(task, both.network), "bidirectional": both}
        for name, (task, both) in pairs.items()
    }


def beginning(recording: Recording, share: float, input_spec: FeatureInput | TextInput) -> Recording:
    """The first steps, so large a share of all, at least one."""
    if isinstance(input_spec, FeatureInput):
        return replace(recording, values=recording.numbers[: math.ceil(share * len(recording.numbers))])
    words = str(recording.values).split(" ")
    return replace(recording, values=" ".join(words[: math.ceil(share * len(words))]))


def by_share(one: Measured) -> list[float]:
    """What the task measures first, of answers about so large a share of each test item; the mean of the runs."""
    scores = []
    for run, result in zip(one.runs, one.results, strict=True):
        items = one.task.items(one.task.split(run).test)
        parts = ([beginning(item, share, result.input_spec) for item in items] for share in SHARES)
        scores.append([one.task.measure(result.answers, part)[0].value for part in parts])
    means: list[float] = np.mean(scores, axis=0).tolist()
    return means


def anytime(page: Path, task: str, measured: Mapping[str, Measured]) -> Sequence[str]:
    """Draw the curves of both directions; gives what the page says with them."""
    picture = f"{page.stem}-{task}-anytime.png"
    curves = {name: by_share(one) for name, one in measured.items()}
    percents = [100 * share for share in SHARES]
    metric = next(iter(measured.values())).metric
    draw_lines(page.parent / picture, percents, curves, "share of the sequence heard, percent", metric)
    return ["When only a part has been heard, each curve the mean of the runs:", f"![{task}: anytime]({picture})"]


def compare(folder: Path, seed: int) -> Path:
    """Train, and write directions.md and two pictures for each task."""
    introduction = (
        "# Forward and bidirectional",
        f"`python -m models compare directions --seed {seed}`: one layer of the same cell with about as many "
        "parameters, forward and bidirectional, three seeds. The forward network answers after each step and is "
        "trained on all of its answers, the bidirectional one answers once, about the mean over all steps; each is "
        "trained with the settings of the bundle of its direction, `sentiment` and `activity` for half as long. "
        "`activity` is one fold (people 9 and 10 held out), in windows of 4 s. Where a stream must answer early, the "
        "curves count: there the bidirectional network is given the beginning as if it were all, anew for each "
        "answer, which no stream can afford. For a task with an answer about each step see "
        "[look-ahead](look_ahead.md).",
    )
    return write_page(folder / "directions.md", introduction, directions(), seed, anytime)
