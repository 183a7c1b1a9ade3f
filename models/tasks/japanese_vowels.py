"""The Japanese Vowels recordings (Kudo, Toyama and Shimbo, 1999): nine men say /ae/; twelve numbers a frame."""

from __future__ import annotations

from functools import cache

import numpy as np

from models.data import Archive, read_member
from models.training.sequences import Recording

ARCHIVE = Archive(
    package="aeon",
    version="1.6.0",
    filename="aeon-1.6.0-py3-none-any.whl",
    sha256="d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
)
# The files with "_eq_" in their name are padded to one length and hide the true one.
FOLDER = "aeon/datasets/data/JapaneseVowels"
COEFFICIENTS = tuple(f"lpc{i}" for i in range(1, 13))
SPEAKERS = tuple(f"speaker {i}" for i in range(1, 10))
FRAMES_PER_SECOND = 156.25  # a frame every 6.4 ms


@cache
def train_recordings() -> tuple[Recording, ...]:
    """The 270 recordings given for training, 30 of each speaker, in their order in the file."""
    return _read("JapaneseVowels_TRAIN.ts")


@cache
def test_recordings() -> tuple[Recording, ...]:
    """The 370 recordings given for testing, 24 to 88 of each speaker, made on other occasions."""
    return _read("JapaneseVowels_TEST.ts")


def _read(name: str) -> tuple[Recording, ...]:
    text = read_member(ARCHIVE, f"{FOLDER}/{name}").decode()
    lines = text.partition("@data\n")[2].splitlines()
    return tuple(parse_line(line, f"{name} {number}") for number, line in enumerate(lines, 1))


def parse_line(line: str, name: str) -> Recording:
    """Dimensions are split by a colon, the frames of one by commas; the label, from 1, comes last."""
    *dimensions, label = line.split(":")
    frames = np.array([dimension.split(",") for dimension in dimensions], dtype=np.float32).T
    return Recording(np.ascontiguousarray(frames), int(label) - 1, name)
