"""Tunes as files."""

from pathlib import Path
from typing import Any

import mido
import pytest

from rnnserve.music import VOICES, Tune, TuneError

CHORD = ["S67", "A62", "T59", "B43"]
WORDS = [*CHORD, "S-", "A62", "-", "B0", "S127", "A-", "T60", "-"]
FRAMES = ((67, 62, 59, 43), (None, 62, None, 0), (127, None, 60, None))


def test_four_words_are_a_frame() -> None:
    assert Tune.of(WORDS) == Tune(FRAMES)


def test_words_behind_the_last_whole_frame_are_left_over() -> None:
    assert Tune.of([*WORDS, "S60", "A60"]) == Tune(FRAMES, ("S60", "A60"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([*CHORD, "A62"], "word 4 is 'A62', where the soprano has S and a note, or a rest"),
        ([*CHORD, "S67", "hello"], "word 5 is 'hello', where the alto has A and a note, or a rest"),
        (["S128", "A62", "T59", "B43"], "word 0 is 'S128', but no MIDI note is above 127"),
        (["S6٧", "A62", "T59", "B43"], "word 0 is 'S6٧'"),
        (["S67", "A62"], "2 words are not one frame of 4 voices"),
        ([], "0 words are not one frame of 4 voices"),
    ],
)
def test_what_is_no_tune_is_refused_by_its_word(words: list[str], problem: str) -> None:
    with pytest.raises(TuneError) as refusal:
        Tune.of(words)
    assert problem in str(refusal.value)


def played(song: Any, track: Any) -> list[tuple[float, float, int]]:
    """Begin and end, in quarter notes, and the note."""
    notes, begun, now = [], dict[int, float](), 0.0
    for message in track:
        now += message.time / song.ticks_per_beat
        if message.type == "note_on":
            begun[message.note] = now
        elif message.type == "note_off":
            notes.append((begun.pop(message.note), now, message.note))
    return notes


def test_a_midi_file_has_a_track_for_each_voice_and_a_quarter_note_for_each_frame(tmp_path: Path) -> None:
    Tune(FRAMES).save_midi(tmp_path / "tune.mid")
    song = mido.MidiFile(tmp_path / "tune.mid")
    assert [track.name for track in song.tracks] == list(VOICES)
    assert played(song, song.tracks[0]) == [(0, 1, 67), (2, 3, 127)]
    assert played(song, song.tracks[1]) == [(0, 1, 62), (1, 2, 62)]
    assert played(song, song.tracks[2]) == [(0, 1, 59), (2, 3, 60)]
    assert played(song, song.tracks[3]) == [(0, 1, 43), (1, 2, 0)]
    assert {sum(message.time for message in track) / song.ticks_per_beat for track in song.tracks} == {3}
    channels = [{message.channel for message in track if not message.is_meta} for track in song.tracks]
    assert channels == [{0}, {1}, {2}, {3}]
    (tempo,) = [message.tempo for message in song.tracks[0] if message.type == "set_tempo"]
    assert song.length == pytest.approx(mido.tick2second(3 * song.ticks_per_beat, song.ticks_per_beat, tempo))


def voices(abc: str) -> list[list[str]]:
    """The lines of each voice."""
    return [lines.split("\n")[1:] for lines in abc.removesuffix("\n").split("\nV:")[1:]]


def soprano(*notes: int | None) -> list[str]:
    return voices(Tune(tuple((note, None, None, None) for note in notes)).abc("t"))[0]


def test_abc_has_a_head_and_each_voice_by_itself() -> None:
    abc = Tune(FRAMES).abc("a tune\nX: by me")
    assert abc.startswith("X:1\nT:a tune X: by me\nM:4/4\nL:1/4\n")
    assert 'V:3 clef=bass name="Tenor"\n' in abc
    assert voices(abc) == [["G z g'''' |]"], ["D D z |]"], ["B, z C |]"], ["G,, C,,,,, z |]"]]


def test_octaves_are_marks_and_letters() -> None:
    assert soprano(48, 59, 60, 71) == ["C, B, C B |]"]
    assert soprano(72, 83, 84, 36) == ["c b c' C,, |]"]


def test_an_accidental_holds_to_the_end_of_its_bar_in_all_octaves_unless_it_is_undone() -> None:
    assert soprano(66, 66, 77, 65, 66, 65, 66, 67, 65) == ["^F ^F =f F | ^F =F ^F G | F |]"]


def test_four_bars_are_a_line() -> None:
    bar = "G G G G"
    assert soprano(*[67] * 36) == [" | ".join([bar] * 4) + " |"] * 2 + [bar + " |]"]
