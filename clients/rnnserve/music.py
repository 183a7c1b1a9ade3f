"""Tunes for four voices as files: MIDI to listen to, ABC to read and to engrave.

A tune is written as words, a frame of four after the other, each frame a quarter note: the letter of the voice and the
number of a MIDI note, or `-` for a rest: `S67 A62 T59 B43 S67 A62 T59 B-`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

VOICES = ("Soprano", "Alto", "Tenor", "Bass")
FRAMES_PER_BAR = 4
BARS_PER_LINE = 4
QUARTERS_PER_MINUTE = 90

_TICKS = 480  # of a quarter note
_CHOIR = 52  # "Choir Aahs" of General MIDI
_VELOCITY = 80
_HIGHEST_NOTE = 127
_WORD = re.compile(r"([SATB])(\d{1,3}|-)", re.ASCII)
_CLEFS = ("treble", "treble", "bass", "bass")
_NAMES = ("C", "^C", "D", "^D", "E", "F", "^F", "G", "^G", "A", "^A", "B")  # as ABC writes them, in the octave from 60

_T = TypeVar("_T")

Frame = tuple[int | None, ...]
"""The number of a MIDI note for each voice; None = a rest."""


class TuneError(ValueError):
    """The words are no tune; the message says which of them is wrong, counted from 0, and why."""


@dataclass(frozen=True)
class Tune:
    """Frames of a quarter note each."""

    frames: tuple[Frame, ...]
    left_over: tuple[str, ...] = ()
    """Words behind the last whole frame: where an output is cut, it may be in the midst of one."""

    @classmethod
    def of(cls, words: Iterable[str]) -> "Tune":
        """Raises TuneError."""
        notes, given = list[int | None](), list(words)
        for place, word in enumerate(given):
            notes.append(_note(word, VOICES[place % len(VOICES)], place))
        whole = len(notes) - len(notes) % len(VOICES)
        if not whole:
            raise TuneError(f"{len(given)} words are not one frame of {len(VOICES)} voices")
        return cls(tuple(_in_groups(notes[:whole], len(VOICES))), tuple(given[whole:]))

    def voice(self, number: int) -> Iterator[int | None]:
        """Its notes, frame by frame."""
        return (frame[number] for frame in self.frames)

    def abc(self, title: str) -> str:
        """In ABC notation 2.1: one voice after the other, all accidentals written out."""
        head = ["X:1", f"T:{' '.join(title.split())}", "M:4/4", "L:1/4", f"Q:1/4={QUARTERS_PER_MINUTE}", "K:C"]
        voices = [
            line
            for number, (name, clef) in enumerate(zip(VOICES, _CLEFS, strict=True))
            for line in (f'V:{number + 1} clef={clef} name="{name}"', *_lines(self.voice(number)))
        ]
        return "\n".join([*head, *voices, ""])

    def save_abc(self, file: Path, title: str) -> None:
        """Writes over the file."""
        file.write_text(self.abc(title), "utf-8")

    def save_midi(self, file: Path) -> None:
        """A track for each voice, each with a channel of its own. Writes over the file. Raises ImportError."""
        mido = midi_library()
        song = mido.MidiFile(type=1, ticks_per_beat=_TICKS)
        for number, name in enumerate(VOICES):
            song.tracks.append(track := mido.MidiTrack())
            track.append(mido.MetaMessage("track_name", name=name))
            if number == 0:
                track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(QUARTERS_PER_MINUTE)))
                track.append(mido.MetaMessage("time_signature", numerator=FRAMES_PER_BAR, denominator=4))
            track.append(mido.Message("program_change", channel=number, program=_CHOIR))
            track.extend(_midi_notes(mido, self.voice(number), channel=number))
        song.save(file)


def midi_library() -> ModuleType:
    """Raises ImportError, which says what to install."""
    try:
        import mido
    except ModuleNotFoundError:
        raise ImportError("MIDI files need the library mido: pip install 'rnnserve[music]'") from None
    library: ModuleType = mido
    return library


def _note(word: str, voice: str, place: int) -> int | None:
    found = _WORD.fullmatch(word)
    if word != "-" and (found is None or found[1] != voice[0]):
        raise TuneError(f"word {place} is {word!r}, where the {voice.lower()} has {voice[0]} and a note, or a rest")
    if found is None or found[2] == "-":
        return None
    if int(found[2]) > _HIGHEST_NOTE:
        raise TuneError(f"word {place} is {word!r}, but no MIDI note is above {_HIGHEST_NOTE}")
    return int(found[2])


def _midi_notes(mido: Any, notes: Iterable[int | None], *, channel: int) -> Iterator[Any]:
    waited = 0  # ticks since the last message
    for note in notes:
        if note is None:
            waited += _TICKS
            continue
        yield mido.Message("note_on", channel=channel, note=note, velocity=_VELOCITY, time=waited)
        yield mido.Message("note_off", channel=channel, note=note, velocity=0, time=_TICKS)
        waited = 0
    yield mido.MetaMessage("end_of_track", time=waited)


def _lines(notes: Iterable[int | None]) -> list[str]:
    bars = [_bar(bar) for bar in _in_groups(list(notes), FRAMES_PER_BAR)]
    lines = [" | ".join(line) + " |" for line in _in_groups(bars, BARS_PER_LINE)]
    return [*lines[:-1], lines[-1] + "]"]


def _bar(notes: Iterable[int | None]) -> str:
    """An accidental holds to the end of its bar, in some programs in all octaves: so naturals are said, too."""
    sharp, written = set[str](), []
    for note in notes:
        if note is None:
            written.append("z")
            continue
        name = _NAMES[note % 12]
        letter = name[-1]
        if name != letter:
            sharp.add(letter)
        elif letter in sharp:
            sharp.remove(letter)
            name = f"={letter}"
        written.append(_in_octave(name, note // 12 - 5))
    return " ".join(written)


def _in_octave(name: str, octave: int) -> str:
    return f"{name}{',' * -octave}" if octave < 1 else f"{name.lower()}{chr(39) * (octave - 1)}"


def _in_groups(values: Sequence[_T], size: int) -> list[tuple[_T, ...]]:
    """The last one may be smaller."""
    return [tuple(values[start : start + size]) for start in range(0, len(values), size)]
