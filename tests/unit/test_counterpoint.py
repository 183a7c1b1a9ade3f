"""What a card of a network that writes chorales counts."""

import pytest

from models.tasks.chorale import frames_of, written
from models.tasks.chorales import REST, Frame
from models.tasks.counterpoint import crossings, parallels

CHORD = (72, 67, 64, 48)  # C5 over G4 over E4 over C3


def test_voices_that_cross_are_counted_in_each_frame_and_silent_ones_are_not() -> None:
    assert crossings([CHORD]) == 0
    assert crossings([(60, 67, 64, 48), (60, 67, 64, 65)]) == 3
    assert crossings([(REST, 67, 64, 48), (72, 67, REST, 65)]) == 0


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ((74, 67, 62, 50), "from frame 1 to 2 soprano and bass move in octaves, from C5 over C3 to D5 over D3"),
        ((71, 69, 64, 50), "from frame 1 to 2 alto and bass move in fifths, from G4 over C3 to A4 over D3"),
    ],
)
def test_two_voices_that_move_alike_at_a_perfect_interval_are_named(after: Frame, said: str) -> None:
    assert parallels([CHORD, after]) == [said]


@pytest.mark.parametrize(
    ("after", "why_not"),
    [
        (CHORD, "nothing moves"),
        ((76, 69, 65, 47), "thirds and sixths may"),
        ((84, 67, 64, 48), "one voice alone moves"),
        ((74, 67, 65, REST), "a voice that is silent moves nowhere"),
    ],
)
def test_other_moves_are_allowed(after: Frame, why_not: str) -> None:
    assert parallels([CHORD, after]) == [], why_not


def test_frames_are_read_back_from_what_a_network_writes_as_far_as_its_voices_take_turns() -> None:
    frames = (CHORD, (REST, 67, 62, 47))
    assert frames_of(f"START {written(frames)}") == list(frames)
    assert frames_of(f"START {written(frames)} S72 A67") == list(frames)
    assert frames_of(f"START S72 A67 T64 T60 {written(frames)} END") == list(frames)
