import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bfloat16 import MIN_PREDICTIONS, RECORD, Bfloat16Loss, use_bfloat16, write_loss
from models.bundle import Bundle, BundleError, load_bundle
from models.manifest import ModelKey
from models.tasks import TASKS
from models.tasks.task import Recordings, Run, Split, Task
from models.training.answers import PredictorAnswers
from models.training.publish import REPOSITORY, measure_bfloat16
from models.training.publish import test_recordings as held_out
from models.training.sequences import Recording, batches, pad
from service.catalog.catalog import Bfloat16, CatalogError, load_catalog
from service.engine.sequence_engine import SequenceEngine
from service.engine.sequence_network import SequenceNetwork
from service.engine.step_kernel import StepKernel
from tests.support.bundles import write_test_repository
from tests.support.reference import Reference, assert_close


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Of this test alone, for it is written to."""
    return write_test_repository(tmp_path)


def measured(folder: Path, **differently: object) -> Bundle:
    """A bundle, with a record that it loses 0.5 points unless told otherwise."""
    bundle = load_bundle(folder)
    said: dict[str, object] = {
        "manifest_sha256": bundle.manifest.manifest_sha256,
        "predictions": MIN_PREDICTIONS,
        "float32_percent": 90.0,
        "bfloat16_percent": 89.5,
    }
    write_loss(folder, Bfloat16Loss.model_validate(said | differently))
    return bundle


def is_bfloat16(bundle: Bundle) -> bool:
    return bundle.predictor.network.recurrent.get_parameter("weight_hh_l0").dtype == torch.bfloat16


def test_the_loss_that_is_allowed_may_be_reached_and_not_passed(repository: Path) -> None:
    bundle = measured(repository / "stacked" / "1")
    with pytest.raises(BundleError, match=r"bfloat16\.json: bfloat16 loses 0\.500 .* more than the 0\.49 allowed"):
        use_bfloat16(bundle, 0.49)
    assert not is_bfloat16(bundle)
    assert use_bfloat16(bundle, 0.5).points == 0.5
    assert is_bfloat16(bundle)


def test_biases_embedding_and_the_layer_that_answers_stay_float32(repository: Path) -> None:
    bundle = measured(repository / "text" / "1")
    use_bfloat16(bundle, 0.5)
    rounded = {name for name, weight in bundle.predictor.network.named_parameters() if weight.dtype == torch.bfloat16}
    assert rounded == {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0"}


def test_a_bundle_that_was_never_measured_is_refused_and_how_to_do_it_is_said(repository: Path) -> None:
    with pytest.raises(BundleError, match=r"never measured; .*python -m models evaluate stacked --bfloat16"):
        use_bfloat16(load_bundle(repository / "stacked" / "1"), 10.0)


def test_too_few_predictions_are_refused(repository: Path) -> None:
    bundle = measured(repository / "stacked" / "1", predictions=MIN_PREDICTIONS - 1)
    with pytest.raises(BundleError, match=r"on 1,999 held-out predictions, 2,000 are needed"):
        use_bfloat16(bundle, 10.0)
    assert not is_bfloat16(bundle)


def test_a_record_of_another_bundle_is_refused(repository: Path) -> None:
    bundle = measured(repository / "stacked" / "1", manifest_sha256="0" * 64)
    with pytest.raises(BundleError, match="another bundle was measured"):
        use_bfloat16(bundle, 10.0)
    assert not is_bfloat16(bundle)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"float32_percent": 101.0}, "float32_percent"),
        ({"bfloat16_percent": None}, "bfloat16_percent"),
        ({"x": 1}, "x"),
    ],
)
def test_a_record_that_is_none_is_refused_in_one_line(repository: Path, change: dict[str, object], field: str) -> None:
    bundle = measured(repository / "stacked" / "1")
    file = bundle.folder / RECORD
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BundleError) as refusal:
        use_bfloat16(bundle, 10.0)
    assert f"{RECORD}: {field}: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_network_that_does_not_stream_may_have_bfloat16_weights_for_whole_sequences(repository: Path) -> None:
    bundle = measured(repository / "bidirectional" / "1")
    use_bfloat16(bundle, 0.5)
    assert is_bfloat16(bundle)


def test_a_network_that_answers_about_the_whole_is_measured_on_every_beginning_of_a_recording() -> None:
    bundle = load_bundle(REPOSITORY / "speaker-bidirectional" / "1")
    (recording,) = [Recording(np.asarray(bundle.samples[0], np.float32), 0)]
    (outputs,) = PredictorAnswers(bundle.predictor).about_steps([recording])
    reference = Reference(bundle.folder)
    assert len(outputs) == len(recording.values)
    for steps, output in enumerate(outputs.numpy(), start=1):
        assert_close(output[None], reference.predict(recording.values[:steps]))


def test_a_catalog_has_bfloat16_weights_in_all_versions_of_the_models_that_are_named_and_in_no_other(
    repository: Path,
) -> None:
    for version in ("1", "2"):
        measured(repository / "vanilla" / version)
    measured(repository / "stacked" / "1")
    catalog = load_catalog(repository, bfloat16=Bfloat16(frozenset({"vanilla"}), 0.5))
    assert {bundle.manifest.key for bundle in catalog if is_bfloat16(bundle)} == {("vanilla", 1), ("vanilla", 2)}


def test_nothing_is_served_where_a_model_that_is_named_was_not_measured_or_is_not_there(repository: Path) -> None:
    with pytest.raises(CatalogError) as refusal:
        load_catalog(repository, bfloat16=Bfloat16(frozenset({"stacked", "stakced"}), 0.5))
    unknown, unmeasured = str(refusal.value).splitlines()
    assert unknown == "bfloat16_models: the repository has no model 'stakced'"
    assert "stacked/1: bfloat16.json: what bfloat16 loses was never measured" in unmeasured


def test_a_model_that_is_loaded_later_is_looked_at_alike(repository: Path) -> None:
    catalog = load_catalog(repository, [ModelKey("text", 1)], Bfloat16(frozenset({"stacked"}), 0.5))
    with pytest.raises(BundleError, match="never measured"):
        catalog.load(ModelKey("stacked", 1))
    measured(repository / "stacked" / "1")
    assert is_bfloat16(catalog.load(ModelKey("stacked", 1)))


def test_what_is_lost_is_measured_over_every_step_of_the_held_out_recordings(tmp_path: Path) -> None:
    folder = tmp_path / "speaker" / "1"
    folder.mkdir(parents=True)
    for name in ("manifest.json", "weights.safetensors", "samples"):
        (folder / name).symlink_to(REPOSITORY / "speaker" / "1" / name)
    bundle = load_bundle(folder)
    recordings = [
        Recording(np.asarray(values, np.float32), bundle.manifest.output.labels.index(sample.label))
        for sample, values in zip(bundle.manifest.samples, bundle.samples, strict=True)
    ]
    loss = measure_bfloat16(holding_out(TASKS["speaker"], recordings), tmp_path)
    outputs = [bundle.predictor.run(torch.tensor(r.values)[None], torch.tensor([len(r.values)]))[0] for r in recordings]
    right = sum(int((out.argmax(dim=1) == r.label).sum()) for out, r in zip(outputs, recordings, strict=True))
    assert loss.predictions == sum(len(recording.values) for recording in recordings)
    assert loss.float32_percent == pytest.approx(100 * right / loss.predictions)
    assert abs(loss.points) < 2.0
    with pytest.raises(BundleError, match=f"measured on {loss.predictions} held-out predictions"):
        use_bfloat16(bundle, 10.0)


def holding_out(task: Task, recordings: Recordings) -> Task:
    def split(_run: Run) -> Split:
        return Split([], [], recordings)

    return replace(task, split=split)


@pytest.mark.data
@pytest.mark.parametrize("name", ["speaker", "activity", "speaker-bidirectional"])
def test_the_networks_lose_less_than_is_allowed_in_live_steps_and_in_whole_sequences(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "1"
    folder.mkdir(parents=True)
    for file in ("manifest.json", "weights.safetensors", "samples"):
        (folder / file).symlink_to(REPOSITORY / name / "1" / file)
    loss = measure_bfloat16(TASKS[name], tmp_path)
    assert loss.predictions >= MIN_PREDICTIONS
    (bundle,) = load_catalog(tmp_path, bfloat16=Bfloat16(frozenset({name}), 0.5))
    assert is_bfloat16(bundle)
    recordings = held_out(TASKS[name])
    assert 100 * whole_sequences_right(bundle, recordings) / loss.predictions == pytest.approx(
        loss.bfloat16_percent, abs=0.1
    )
    if bundle.manifest.network.streamable:
        right = [live_steps_right(bundle, group) for group in batches(recordings, 64)]
        assert 100 * sum(right) / loss.predictions == pytest.approx(loss.bfloat16_percent, abs=0.05)


def whole_sequences_right(bundle: Bundle, recordings: Recordings) -> int:
    """How many answers of the engine, about the steps of each, or about each beginning of it."""
    network, engine = SequenceNetwork(bundle.predictor, bundle.manifest.key), SequenceEngine(64, 32)
    labels: list[int] = []
    for recording in recordings:
        each_step = bundle.manifest.network.readout == "each_step"
        ends = [len(recording.values)] if each_step else range(1, len(recording.values) + 1)
        for end in ends:
            engine.add(len(labels), network, recording.numbers[:end])
            labels.append(recording.label)
    right = 0
    while engine:
        for number, outputs in engine.tick().ended:
            assert isinstance(outputs, np.ndarray)
            right += int((outputs.argmax(axis=1) == labels[number]).sum())
    return right


@torch.no_grad()
def live_steps_right(bundle: Bundle, recordings: Recordings) -> int:
    """How many answers, of streams of these recordings that share their ticks."""
    kernel, batch = StepKernel(bundle.predictor), pad(recordings)
    labels = torch.tensor([recording.label for recording in recordings])
    rows, right = torch.zeros(len(recordings), bundle.predictor.row_size), 0
    for t in range(batch.values.shape[1]):
        outputs, rows = kernel.step(batch.values[:, t], rows)
        right += int(((outputs.argmax(dim=1) == labels) & (t < batch.lengths)).sum())
    return right
