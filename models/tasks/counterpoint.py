"""Rules of four-part writing that Bach seldom breaks, to count how often a network does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from models.tasks.chorales import REST, Frame

VOICES = "soprano", "alto", "tenor", "bass"
NAMES = "C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B"
PERFECT = {7: "fifths", 0: "octaves"}
"""By semitones, octaves left out; a unison counts as an octave."""


def crossings(piece: Sequence[Frame]) -> int:
    """How often a voice is below the next lower one."""
    pairs = (pair for frame in piece for pair in itertools.pairwise(frame))
    return sum(higher < lower for higher, lower in pairs if REST not in (higher, lower))


def parallels(piece: Sequence[Frame]) -> list[str]:
    """Where two voices move alike from one perfect fifth or octave to the next, in words."""
    return [
        f"from frame {number} to {number + 1} {VOICES[i]} and {VOICES[j]} move in {kind}, from {name(before[i])} over "
        f"{name(before[j])} to {name(after[i])} over {name(after[j])}"
        for number, (before, after) in enumerate(itertools.pairwise(piece), 1)
        for i, j, kind in _in_parallel(before, after)
    ]


def _in_parallel(before: Frame, after: Frame) -> Iterator[tuple[int, int, str]]:
    for i, j in itertools.combinations(range(len(VOICES)), 2):
        if REST in (before[i], before[j], after[i], after[j]):
            continue
        interval, moved = (before[i] - before[j]) % 12, after[i] - before[i]
        if interval in PERFECT and moved != 0 and after[j] - before[j] == moved:
            yield i, j, PERFECT[interval]


def name(note: int) -> str:
    """60 -> `C4`."""
    return f"{NAMES[note % 12]}{note // 12 - 1}"
