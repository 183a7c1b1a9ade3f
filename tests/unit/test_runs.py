from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.tasks.task import Run, Split
from models.training import publish
from models.training.runs import Job, Result, run_once
from tests.support.tasks import TEST, TRAIN, VALIDATION, small_task

RUN = Run(0)


def test_the_test_part_changes_nothing_in_the_weights_or_the_normalisation() -> None:
    poisoned = [replace(recording, values=recording.numbers * 1e6, target=0) for recording in TEST]
    first, second = (run_once(Job(small_task(test), RUN)) for test in (TEST, poisoned))
    assert first.input_spec == second.input_spec
    assert torch.equal(first.network.output.weight, second.network.output.weight)
    assert first.scores != second.scores


def test_the_shipped_weights_come_from_training_and_validation_part_together() -> None:
    whole = run_once(Job(small_task(), RUN))
    other = run_once(Job(small_task(split=lambda run: Split([*TRAIN, *VALIDATION], (), TEST)), RUN))
    assert torch.equal(whole.network.output.weight, other.network.output.weight)


def test_a_rehearsal_validates_after_each_epoch_and_never_looks_at_the_test() -> None:
    rehearsal = run_once(Job(small_task(test=()), RUN, is_rehearsal=True))
    assert rehearsal.scores == ()
    assert [epoch.number for epoch in rehearsal.fitted.history] == [1, 2, 3]
    assert all(epoch.validation_loss > 0 for epoch in rehearsal.fitted.history)


def test_a_long_task_is_trained_without_its_validation_part_and_scored() -> None:
    long = run_once(Job(replace(small_task(), is_long=True), RUN))
    rehearsal = run_once(Job(small_task(), RUN, is_rehearsal=True))
    assert torch.equal(long.network.output.weight, rehearsal.network.output.weight)
    assert len(long.scores) == 1


def run_here(jobs: list[Job], _processes: int) -> list[Result]:
    return [run_once(job) for job in jobs]


def test_training_a_task_writes_a_bundle_that_gives_its_number_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "run_all", run_here)
    manifest = publish.train_task(small_task(), 0, tmp_path)
    measured, read = publish.measure_again(small_task(), tmp_path)
    assert read.quality == manifest.quality
    assert measured == manifest.quality.value
    assert {path.name for path in (tmp_path / "small" / "1" / "samples").iterdir()} == {
        "low.csv",
        "middle.csv",
        "high.csv",
    }


def test_weights_of_half_precision_are_rounded_before_they_are_scored_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "run_all", run_here)
    task = replace(small_task(), half_precision=True)
    result = run_once(Job(task, RUN))
    for weights in result.network.state_dict().values():
        assert torch.equal(weights, weights.half().float())
    manifest = publish.train_task(task, 0, tmp_path)
    assert publish.measure_again(task, tmp_path)[0] == manifest.quality.value == result.scores[0].value
    assert load_file(tmp_path / "small" / "1" / "weights.safetensors")["output.weight"].dtype == torch.float16
