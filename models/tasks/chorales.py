"""Four-part chorales by J. S. Bach, a frame each quarter note, read from the MusicXML files of the package music21."""

from __future__ import annotations

import io
import itertools
import math
import zipfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import NamedTuple
from xml.etree import ElementTree

from models.data import Archive, read_members

ARCHIVE = Archive(
    package="music21",
    version="10.5.1",
    filename="music21-10.5.1-py3-none-any.whl",
    sha256="dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
)
FOLDER = "music21/corpus/bach/"
PARTS = 4
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
REST = 0
WINDOW_FRAMES = 8
BEGINNING, STRETCH = 8, 13  # notes that tell a tune: the first ones, or any in a row

Frame = tuple[int, int, int, int]
"""MIDI note numbers of soprano, alto, tenor and bass; REST where a voice is silent."""


Windows = frozenset[tuple[tuple[int | None, ...], ...]]


class Chorale(NamedTuple):
    """A piece, moved to the key without sharps and flats."""

    name: str
    frames: tuple[Frame, ...]

    @property
    def intervals(self) -> tuple[int, ...]:
        """Of the soprano, in semitones, repetitions left out: a tune in whatever key."""
        notes = [frame[0] for frame in self.frames if frame[0] != REST]
        return tuple(to - note for note, to in itertools.pairwise(notes) if to != note)


class _Note(NamedTuple):
    start: Fraction  # quarter notes from the beginning
    end: Fraction
    pitch: int


@cache
def chorales() -> tuple[Chorale, ...]:
    """All that have four parts of single notes, by name; of settings that are the same for the most part the first.

    Files that reserve rights (`.krn`) are left out.
    """
    kept: dict[Chorale, Windows] = {}
    for name, packed in sorted(read_members(ARCHIVE, FOLDER, ".mxl").items()):
        if frames := read_frames(_score(packed)):
            windows = windows_of(frames)
            if not any(are_alike(windows, others) for others in kept.values()):
                kept[Chorale(name.removeprefix(FOLDER).removesuffix(".mxl"), frames)] = windows
    return tuple(kept)


def windows_of(frames: tuple[Frame, ...]) -> Windows:
    """Each stretch of some frames, in semitones from its first soprano note: how a tune is set, in whatever key."""
    starts = range(max(1, len(frames) - WINDOW_FRAMES + 1))
    return frozenset(_from_first_note(frames[start : start + WINDOW_FRAMES]) for start in starts)


def are_alike(windows: Windows, others: Windows) -> bool:
    """Whether they share half of the shorter piece's."""
    return 2 * len(windows & others) >= min(len(windows), len(others))


def tunes(pieces: Sequence[Chorale]) -> dict[str, str]:
    """By the name of each piece its tune: the first name of those that share one.

    Two pieces do if they begin with the same eight notes, in whatever key and octave, or have any thirteen in common;
    and with them all that share one with either.
    """
    first = {piece.name: piece.name for piece in pieces}

    def tune_of(name: str) -> str:
        while first[name] != name:
            name = first[name]
        return name

    known: dict[tuple[object, ...], str] = {}
    for piece in pieces:
        intervals = piece.intervals
        beginning = ("beginning", *(interval % 12 for interval in intervals[: BEGINNING - 1]))
        starts = range(len(intervals) - STRETCH + 2)
        for key in (beginning, *(intervals[start : start + STRETCH - 1] for start in starts)):
            one, another = sorted((tune_of(piece.name), tune_of(known.setdefault(key, piece.name))))
            first[another] = one
    return {name: tune_of(name) for name in first}


def _from_first_note(frames: tuple[Frame, ...]) -> tuple[tuple[int | None, ...], ...]:
    root = frames[0][0]
    return tuple(tuple(None if note == REST else note - root for note in frame) for frame in frames)


def _score(packed: bytes) -> ElementTree.Element:
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        name = next(name for name in archive.namelist() if not name.startswith("META-INF") and name.endswith("xml"))
        return ElementTree.fromstring(archive.read(name))


def read_frames(score: ElementTree.Element) -> tuple[Frame, ...]:
    """What sounds at each quarter note; nothing for a piece that is not of four parts of single notes."""
    parts = score.findall("part")
    try:
        voices = [list(_notes(part)) for part in parts]
    except ValueError:
        return ()
    if len(parts) != PARTS or not all(voices):
        return ()
    shift = _to_no_accidentals(int(score.findtext("part/measure/attributes/key/fifths") or 0))
    sounding = [_sounding(voice, shift) for voice in voices]
    soprano, alto, tenor, bass = sounding
    return tuple(itertools.zip_longest(soprano, alto, tenor, bass, fillvalue=REST))


def _to_no_accidentals(fifths: int) -> int:
    """Semitones, up or down by no more than six."""
    return (-7 * fifths + 6) % 12 - 6


def _sounding(voice: list[_Note], shift: int) -> list[int]:
    """At each quarter note the one that has begun and not ended."""
    quarters = [REST] * math.ceil(voice[-1].end)
    for note in voice:
        for quarter in range(math.ceil(note.start), math.ceil(note.end)):
            quarters[quarter] = note.pitch + shift
    return quarters


def _notes(part: ElementTree.Element) -> Iterator[_Note]:
    """Raises ValueError for chords and for several voices in one part."""
    now, divisions = Fraction(0), 1
    for measure in part.iter("measure"):
        for element in measure:
            if element.tag == "attributes" and (text := element.findtext("divisions")):
                divisions = int(text)
            if element.tag == "backup" or element.find("chord") is not None:
                raise ValueError(element.tag)
            if element.tag == "forward":
                now += Fraction(element.findtext("duration") or "0") / divisions
            if element.tag == "note" and element.find("grace") is None:
                end = now + Fraction(element.findtext("duration") or "0") / divisions
                pitch = element.find("pitch")
                if pitch is not None:
                    yield _Note(now, end, _midi(pitch))
                now = end


def _midi(pitch: ElementTree.Element) -> int:
    step, octave = pitch.findtext("step") or "", int(pitch.findtext("octave") or 0)
    return 12 * (octave + 1) + SEMITONES[step] + int(float(pitch.findtext("alter") or 0))
