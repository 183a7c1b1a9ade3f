import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from models.__main__ import app
from models.bundle import load_bundle, write_manifest
from models.gallery import describe_gallery
from models.manifest import FeatureInput
from models.tasks import TASKS
from models.training import publish
from models.training.answers import PredictorAnswers
from models.training.card import describe_heard
from models.training.measure import accuracy_by_steps
from models.training.publish import REPOSITORY, measure_again, samples_of
from tests.support.server import ROOT

FOLDERS = sorted(path.parent for path in REPOSITORY.glob("*/*/manifest.json"))
NAMES = [folder.parent.name for folder in FOLDERS]
each_bundle = pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
each_task = pytest.mark.parametrize("name", TASKS)
runner = CliRunner()


def test_every_task_has_a_bundle() -> None:
    assert set(NAMES) >= set(TASKS)


@each_bundle
def test_a_bundle_loads_and_is_small_enough_to_commit(folder: Path) -> None:
    assert load_bundle(folder).manifest.summary
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 5_000_000
    assert all(path.stat().st_size < 100_000 for path in folder.glob("*.png"))


@each_bundle
def test_a_manifest_is_to_the_byte_what_training_writes(folder: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, load_bundle(folder).manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


@each_bundle
def test_a_bundle_can_answer_about_its_samples(folder: Path) -> None:
    bundle = load_bundle(folder)
    stated, task = bundle.manifest.on_samples, TASKS[bundle.manifest.name]
    assert stated is not None
    measured = task.measure(PredictorAnswers(bundle.predictor), task.items(samples_of(bundle)))[0]
    assert (measured.metric, measured.items) == (stated.metric, stated.items)
    assert measured.value == pytest.approx(stated.value, rel=1e-4)


@each_bundle
def test_a_table_of_samples_names_its_columns(folder: Path) -> None:
    manifest = load_bundle(folder).manifest
    for sample in manifest.samples:
        if isinstance(manifest.input, FeatureInput):
            assert (folder / sample.file).read_text().splitlines()[0] == ",".join(manifest.input.feature_names)


def test_all_bundles_together_take_no_more_than_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in REPOSITORY.rglob("*") if path.is_file()) < 25_000_000


@pytest.mark.data
@each_task
def test_the_samples_are_those_of_the_task_to_the_last_digit(name: str) -> None:
    task, folder = TASKS[name], REPOSITORY / name / "1"
    recordings = task.samples(task.split(task.runs(0)[0]).test)
    for values, recording in zip(load_bundle(folder).samples, recordings, strict=True):
        assert np.array_equal(np.asarray(values), np.asarray(recording.values))


@pytest.mark.data
@each_task
def test_measuring_a_bundle_anew_gives_the_number_in_its_manifest(name: str) -> None:
    value, manifest = measure_again(TASKS[name])
    assert value == pytest.approx(manifest.quality.value, abs=1e-6)
    assert manifest.repeats is not None
    assert manifest.repeats.values[0] == manifest.quality.value


@each_bundle
def test_the_card_states_the_number_the_licence_and_how_to_do_it_again(folder: Path) -> None:
    card, manifest = (folder / "README.md").read_text(), load_bundle(folder).manifest
    assert f"**{manifest.quality.value:.2f}**" in card
    assert manifest.data.licence in card
    assert f"python -m models train {manifest.name}" in card
    assert all((folder / picture).exists() for picture in card.split("](")[1::1] if picture.endswith(".png"))


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.heard_steps])
def test_the_card_says_what_is_measured_as_the_network_listens(name: str) -> None:
    task, folder = TASKS[name], REPOSITORY / name / "1"
    bundle = load_bundle(folder)
    heard = accuracy_by_steps(PredictorAnswers(bundle.predictor), publish.test_recordings(task), task.heard_steps)
    assert describe_heard(bundle.manifest, heard) in (folder / "README.md").read_text()


def test_the_card_says_how_recordings_count_that_are_over() -> None:
    text = describe_heard(load_bundle(FOLDERS[0]).manifest, {1: 80.0})
    assert "a recording that is already over counts with its last answer" in text


@pytest.mark.data
def test_evaluate_fails_where_the_manifest_claims_another_number(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "speaker", tmp_path / "speaker")
    folder = tmp_path / "speaker" / "1"
    manifest = load_bundle(folder).manifest
    command = ["evaluate", "speaker", "--repository", str(tmp_path)]
    assert runner.invoke(app, command).exit_code == 0
    claim = manifest.quality.model_copy(update={"value": 97.0})
    write_manifest(folder, manifest.model_copy(update={"quality": claim}))
    result = runner.invoke(app, command)
    assert result.exit_code == 1
    assert "97.000000" in result.output


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_unknown_task_is_named_beside_the_known_ones(command: str) -> None:
    result = runner.invoke(app, [command, "sonnets"])
    assert result.exit_code == 2
    assert "sonnets" in result.output
    assert "speaker-bidirectional" in result.output


def test_list_shows_every_bundle_with_its_quality() -> None:
    result = runner.invoke(app, ["list"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(name in result.output for name in NAMES)


def test_the_gallery_is_up_to_date() -> None:
    page = ROOT / "docs" / "models.md"
    assert page.read_text() == describe_gallery(REPOSITORY, page), "`python -m models gallery` writes it again"


def test_the_gallery_leads_to_every_card_and_picture() -> None:
    page = ROOT / "docs" / "models.md"
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert len(links) == 2 * len(FOLDERS)
    assert all((page.parent / link).exists() for link in links)
