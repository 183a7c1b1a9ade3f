"""What a card says of the mistakes of a bundle, beside what the bundle says of the same texts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from models.bundle import load_bundle
from models.tasks import TASKS
from models.tasks.counterpoint import VOICES
from models.tasks.pronunciation import mistaken
from models.tasks.task import Recordings, Task
from models.training.answers import PredictorAnswers
from models.training.publish import REPOSITORY


def told_of_its_samples(name: str) -> tuple[Task, PredictorAnswers, Recordings, list[list[str]]]:
    """The task, its shipped network, the samples of the bundle, and the rows of the card's table about them."""
    task = TASKS[name]
    bundle = load_bundle(REPOSITORY / name / "1")
    answers, samples = PredictorAnswers(bundle.predictor), task.samples(())
    text = task.errors(answers, samples, task.output)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return task, answers, samples, rows[2:]


def test_the_letters_in_the_table_are_those_that_are_marked_as_wrong_in_the_sentences() -> None:
    task, answers, samples, rows = told_of_its_samples("diacritics")
    sentences = task.errors(answers, samples, task.output).splitlines()
    words = [pair for line in sentences for pair in re.findall(r"\*\*(.+?)\*\* \(not (.+?)\)", line)]
    wrong_letters = sum(found != meant for pair in words for found, meant in zip(*pair, strict=True))
    assert wrong_letters > 0
    assert sum(int(row[2]) + int(row[4]) for row in rows) == wrong_letters


def test_each_sentence_is_in_one_field_of_the_table_of_ratings() -> None:
    _, answers, samples, rows = told_of_its_samples("sentiment")
    fields = np.array([row[1:] for row in rows], int)
    assert fields.sum() == len(samples)
    below_0 = (answers.about_all(samples) < -0.5).sum()
    assert fields[:, :2].sum() == below_0


def test_the_nats_of_the_voices_add_up_to_those_of_a_frame() -> None:
    task, answers, samples, rows = told_of_its_samples("chorale")
    (score,) = task.measure(answers, samples)
    assert sum(float(row[1]) for row in rows[: len(VOICES)]) == pytest.approx(score.value, abs=0.02)  # four roundings


def test_sounds_are_compared_where_as_many_were_written_as_were_meant() -> None:
    assert list(mistaken((1, 2, 9, 4), (1, 2, 3, 4))) == [(3, 9)]
    assert list(mistaken((1, 2, 8, 9, 4), (1, 2, 3, 4))) == []
    assert list(mistaken((2, 4), (1, 2, 3, 4))) == []
