"""What comes next? A network that writes chorales, voice by voice: one-to-many."""

from __future__ import annotations

import re

import numpy as np

from models.tasks.chorales import REST, Frame, chorales
from models.tasks.splits import hundredth
from models.tasks.task import Recordings, Run, Split
from models.training.answers import Answers
from models.training.scores import Score, ratio
from models.training.sequences import Recording

START, END = "START", "END"
RANGES = {"S": (52, 87), "A": (44, 83), "T": (41, 78), "B": (28, 71)}
"""Of each voice's notes, those of training moved up and down included."""
SYMBOLS = (
    START,
    END,
    *(f"{voice}{note}" for voice, (low, high) in RANGES.items() for note in ("-", *range(low, high + 1))),
)
TEST_BELOW, VALIDATION_BELOW = 20, 35  # hundredths of the incipits
MOVED_BY = 2  # semitones at most, in training
SEEDS = 3


def written(frames: tuple[Frame, ...], by: int = 0) -> str:
    """`S72 A67 T64 B48 S71 …`: the four voices of each frame in turn, moved by so many semitones."""
    return " ".join(
        f"{voice}{'-' if note == REST else note + by}"
        for frame in frames
        for voice, note in zip("SATB", frame, strict=True)
    )


def recording(text: str, name: str) -> Recording:
    """A piece, to be foretold symbol by symbol from the one before."""
    return Recording(f"{START} {text}", np.array([SYMBOLS.index(symbol) for symbol in (*text.split(), END)]), name)


def split(_run: Run) -> Split:
    """By the hash of the tune's beginning: many of the chorales are settings of one tune."""
    parts: tuple[list[Recording], list[Recording], list[Recording]] = [], [], []
    for piece in chorales():
        place = hundredth(piece.incipit)
        part = parts[2 if place < TEST_BELOW else 1 if place < VALIDATION_BELOW else 0]
        part.append(recording(written(piece.frames), piece.name))
    return Split(*parts)


def moved(recordings: Recordings, rng: np.random.Generator) -> Recordings:
    """Each piece some semitones higher or lower."""
    steps = rng.integers(-MOVED_BY, MOVED_BY + 1, len(recordings))
    return [
        recording(move(str(r.values).removeprefix(f"{START} "), int(by)), r.name)
        for r, by in zip(recordings, steps, strict=True)
    ]


def move(text: str, by: int) -> str:
    """The same notes, so many semitones higher."""
    return re.sub(r"\d+", lambda note: str(int(note[0]) + by), text)


def measure(answers: Answers, recordings: Recordings) -> tuple[Score, ...]:
    """Nats that the four notes of a frame take, given all before them."""
    nats, frames = [], []
    for r, outputs in zip(recordings, answers.about_steps(recordings), strict=True):
        labels = np.asarray(r.target)[:-1]  # its notes, without the end
        log_probabilities = outputs.log_softmax(dim=-1).numpy()
        nats.append(-log_probabilities[np.arange(len(labels)), labels].sum())
        frames.append(len(labels) / len(RANGES))
    return (ratio("nats a frame of four voices", nats, frames),)
