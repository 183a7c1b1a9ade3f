import numpy as np
import pytest
import torch

from models.tasks import TASKS, activity, japanese_vowels, shoulder_exercises, speaker
from models.tasks.augment import rotation, stretch
from models.tasks.japanese_vowels import parse_line
from models.tasks.task import Run, Task
from models.training.sequences import Recording
from tests.support.answers import Saying

RNG = np.random.default_rng(0)
ALWAYS_0 = torch.eye(7)[0]
needs_data = pytest.mark.data


def test_a_line_of_the_vowels_holds_dimensions_by_colon_and_frames_by_comma() -> None:
    recording = parse_line("1,2,3:4,5,6:9", "a")
    assert recording.numbers.tolist() == [[1, 4], [2, 5], [3, 6]]
    assert recording.label == 8


@needs_data
def test_the_vowels_are_those_of_the_given_split() -> None:
    train, test = japanese_vowels.train_recordings(), japanese_vowels.test_recordings()
    assert np.bincount([r.label for r in train]).tolist() == [30] * 9
    assert np.bincount([r.label for r in test]).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert {r.numbers.shape[1] for r in train + test} == {12}
    assert (min(len(r.values) for r in train + test), max(len(r.values) for r in train + test)) == (7, 29)


@needs_data
def test_the_speakers_validation_part_is_taken_from_the_training_file_alone() -> None:
    split = speaker.split(speaker.runs(0)[0])
    assert np.bincount([r.label for r in split.validation]).tolist() == [10] * 9
    names = [{r.name for r in part} for part in split]
    assert [len(part) for part in names] == [180, 90, 370]
    assert not names[0] & names[1]
    assert all("TEST" in name for name in names[2])


@needs_data
@pytest.mark.parametrize("run", activity.runs(0), ids=str)
def test_nobody_is_on_two_sides_of_an_activity_split(run: Run) -> None:
    train, validation, test = ({r.group for r in part} for part in activity.split(run))
    assert test == set(run.held_out)
    assert (len(train), len(validation)) == (6, 2)
    assert train | validation | test == set(range(1, 11))


@needs_data
def test_the_folds_hold_each_person_out_once_and_nine_and_ten_first() -> None:
    held_out = [person for run in activity.runs(0) for person in run.held_out]
    assert held_out[:2] == [9, 10]
    assert sorted(held_out) == list(range(1, 11))


@needs_data
def test_the_exercises_are_at_half_the_recorded_rate() -> None:
    recordings = shoulder_exercises.recordings()
    assert len(recordings) == 140
    assert {(r.group, r.label) for r in recordings} == {(p, e) for p in range(1, 11) for e in range(7)}
    assert 473 <= min(len(r.values) for r in recordings) <= max(len(r.values) for r in recordings) <= 1309


def test_halving_the_rate_averages_each_two_readings() -> None:
    assert shoulder_exercises.halve_rate(np.array([[1.0], [3.0], [5.0], [5.0], [9.0]])).tolist() == [[2], [5]]


def test_windows_lie_side_by_side_and_a_short_rest_is_dropped() -> None:
    values = np.arange(250, dtype=np.float32)[:, None]
    windows = activity.windows([Recording(values, 3)])
    assert [(w.numbers[0, 0], w.numbers[-1, 0], w.label) for w in windows] == [(0, 99, 3), (100, 199, 3)]


def test_windows_count_one_by_one_but_a_recording_is_drawn_as_a_whole() -> None:
    def windows(name: str, label: int, count: int) -> list[Recording]:
        return [Recording(np.zeros((1, 6), dtype=np.float32), label, name)] * count

    several = [*windows("left", 0, 30), *windows("left", 1, 10), *windows("right", 0, 20)]
    (score,) = activity.measure(Saying([ALWAYS_0] * 60), several)
    assert score.value == pytest.approx(100 * 50 / 60)
    assert score.items == 60
    assert (score.low, score.high) == (0, 100)  # only the second one, or any of the others
    (alone,) = activity.measure(Saying([ALWAYS_0] * 30), several[:30])
    assert (alone.low, alone.high) == (100, 100)


def test_crops_have_about_as_many_steps_as_the_recordings_and_keep_their_labels() -> None:
    recordings = [Recording(RNG.normal(size=(900, 6)).astype(np.float32), label) for label in (2, 5)]
    crops = activity.crops(recordings, RNG)
    assert 1800 <= sum(len(crop.values) for crop in crops) <= 1800 + 2 * max(activity.CROP_STEPS)
    assert {crop.label for crop in crops} == {2, 5}


def test_the_other_arm_of_the_other_arm_is_the_first() -> None:
    assert (activity.OTHER_ARM**2 == 1).all()


def test_a_rotation_keeps_lengths_and_turns_by_its_angle() -> None:
    turn = rotation(np.array([0.0, 0.0, 2.0]), np.pi / 2)
    assert np.allclose(turn @ [1, 0, 0], [0, 1, 0], atol=1e-6)
    assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-6)


def test_stretching_keeps_the_ends_and_changes_the_length() -> None:
    values = np.array([[0.0], [1.0], [2.0]], dtype=np.float32)
    assert stretch(values, 5 / 3).ravel().tolist() == [0, 0.5, 1, 1.5, 2]


def test_a_piece_is_a_run_of_three_fifths_of_the_frames_or_more() -> None:
    values = np.arange(20, dtype=np.float32)[:, None]
    pieces = [speaker.piece(values, RNG) for _ in range(200)]
    assert all((np.diff(piece, axis=0) == 1).all() for piece in pieces)
    assert {len(piece) for piece in pieces} == set(range(12, 21))
    assert {piece[0, 0] for piece in pieces} >= {0, 1, 2, 3, 4, 5}


@needs_data
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_first_run_of_a_task_is_the_one_whose_weights_ship_whatever_the_seed(task: Task) -> None:
    assert [r.name for r in task.split(task.runs(0)[0]).test] == [r.name for r in task.split(task.runs(7)[0]).test]
    assert task.runs(7)[0].seed == 7


@needs_data
def test_samples_are_the_first_of_the_test_recordings() -> None:
    vowels = speaker.first_of_each_speaker(japanese_vowels.test_recordings())
    assert [r.label for r in vowels] == list(range(9))
    assert vowels[1].name == "JapaneseVowels_TEST.ts 32"
    exercises = activity.four_exercises(activity.split(activity.runs(0)[0]).test)
    assert len({r.label for r in exercises}) == 4
    assert {r.group for r in exercises} <= {9, 10}
    assert max(len(r.values) for r in exercises) >= 20 * shoulder_exercises.STEPS_PER_SECOND
