from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.tasks import TASKS
from models.tasks.task import Run, Split
from models.training import ablation, publish
from models.training.ablation import comparisons, variants, verdict
from models.training.card import add_ablation
from models.training.runs import Job, Result, run_once
from tests.support.tasks import TEST, TRAIN, VALIDATION, small_task

RUN = Run(0)


def test_the_test_part_changes_nothing_in_the_weights_or_the_normalisation() -> None:
    poisoned = [replace(recording, values=recording.numbers * 1e6, target=0) for recording in TEST]
    first, second = (run_once(Job(small_task(test), RUN, rehearse=True)) for test in (TEST, poisoned))
    assert first.input_spec == second.input_spec
    assert torch.equal(first.network.output.weight, second.network.output.weight)
    assert first.scores != second.scores


def test_the_shipped_weights_come_from_training_and_validation_part_together() -> None:
    whole = run_once(Job(small_task(), RUN))
    other = run_once(Job(small_task(split=lambda run: Split([*TRAIN, *VALIDATION], (), TEST)), RUN))
    assert torch.equal(whole.network.output.weight, other.network.output.weight)


def test_a_rehearsal_is_shown_but_does_not_change_the_run() -> None:
    rehearsed, plain = run_once(Job(small_task(), RUN, rehearse=True)), run_once(Job(small_task(), RUN))
    assert torch.equal(rehearsed.network.output.weight, plain.network.output.weight)
    assert plain.rehearsal is None
    assert rehearsed.rehearsal is not None
    assert len(rehearsed.rehearsal.history) == 3


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


def test_an_ablation_is_kept_when_the_card_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "run_all", run_here)
    monkeypatch.setattr(ablation, "run_all", run_here)
    publish.train_task(small_task(), 0, tmp_path)
    text = ablation.ablate(small_task(), 0, tmp_path).read_text()
    card = tmp_path / "small" / "1" / "README.md"
    add_ablation(card.parent)
    assert card.read_text().count(text) == 1
    publish.train_task(small_task(), 0, tmp_path)
    assert card.read_text().count(text) == 1


def test_an_ablation_deepens_one_block_at_a_time() -> None:
    deep = TASKS["activity"].network
    shallow, stacked, *one_block, every = variants(deep).values()
    assert (shallow.layers, shallow.input_layers, shallow.transition_layers, shallow.output_layers) == (1, (), 1, ())
    assert stacked == shallow.model_copy(update={"layers": deep.layers})
    assert every == deep
    for spec in one_block:
        differing = [name for name in type(spec).model_fields if getattr(spec, name) != getattr(stacked, name)]
        assert len(differing) == 1


def test_every_variant_is_compared_with_the_one_that_it_deepens() -> None:
    assert comparisons("abcd") == [("b", "a"), ("c", "b"), ("d", "b"), ("d", "a")]


@pytest.mark.parametrize(
    ("values", "reading"),
    [([80.0, 85.0, 90.0], "no clear difference"), ([75.0, 76.1, 80.0], "better"), ([60.0, 61.0, 65.5], "worse")],
)
def test_a_difference_counts_only_beyond_twice_its_standard_error(values: list[float], reading: str) -> None:
    base = [70.0, 71.0, 75.0] if reading != "no clear difference" else [70.0, 95.0, 85.0]
    assert reading in verdict(values, base)
