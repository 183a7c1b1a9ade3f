import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from models.bundle import BundleError, load_bundle, save_bundle
from models.manifest import Sample, TextInput, manifest_digest
from models.recurrent import NetworkSpec, RecurrentNetwork
from models.training.card import parameters_of
from models.training.runs import round_weights
from tests.support.bundles import LABELS, features, manifest, write_bundle

Json = dict[str, Any]
Tensors = dict[str, torch.Tensor]
SAMPLE = {"file": "samples/one.csv", "label": "north", "description": "two steps"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle that is right, with a sample."""
    spec = NetworkSpec(cell="gru", features=3, hidden_size=4, outputs=4)
    bundle = write_bundle(tmp_path_factory.mktemp("good"), manifest("compass", spec, features(3), labels=LABELS))
    (bundle.folder / "samples").mkdir()
    (bundle.folder / "samples" / "one.csv").write_text("a,b,c\n1,2,3\n4,5,6\n")
    edit_manifest(bundle.folder, lambda content: content.update(samples=[SAMPLE]))
    return bundle.folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return shutil.copytree(good, tmp_path / "compass" / "1")


def edit_manifest(folder: Path, edit: Callable[[Json], object]) -> None:
    """Change what it says, with a digest that fits."""
    change_manifest(folder, edit)
    digest = manifest_digest((folder / "manifest.json").read_text())
    change_manifest(folder, lambda content: content.update(manifest_sha256=digest))


def change_manifest(folder: Path, edit: Callable[[Json], object]) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Spoil tensors, with a digest that fits."""
    tensors = load_file(folder / "weights.safetensors")
    edit(tensors)
    write_weights(folder, save(tensors))


def write_weights(folder: Path, content: bytes) -> None:
    (folder / "weights.safetensors").write_bytes(content)
    edit_manifest(folder, lambda it: it.update(weights_sha256=hashlib.sha256(content).hexdigest()))


def assert_refused(folder: Path, field: str, problem: str) -> None:
    with pytest.raises(BundleError) as refusal:
        load_bundle(folder)
    assert refusal.value.field == field
    assert problem in refusal.value.problem
    assert str(folder) in str(refusal.value)


def test_a_right_bundle_is_loaded(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.manifest.key == ("compass", 1)
    assert bundle.manifest.samples[0].label == "north"


@pytest.mark.parametrize("file", ["manifest.json", "weights.safetensors"])
def test_a_missing_file_is_refused(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert_refused(folder, file, "No such file")


@pytest.mark.parametrize("content", [b"not json", b"", b"\xff\xfe", b"[1, 2]"])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert_refused(folder, "manifest.json", "")


def with_features(**fields: list[object]) -> Callable[[Json], object]:
    return lambda content: content["input"].update(fields)


def with_repeats(over: str, *values: float) -> Callable[[Json], object]:
    repeats = {"metric": "accuracy, percent", "over": over, "values": values}
    return lambda content: content.update(repeats=repeats)


WRONG_MANIFESTS: dict[str, tuple[Callable[[Json], object], str, str]] = {
    "unknown key": (lambda it: it.update(colour="red"), "colour", "Extra inputs"),
    "unknown key inside": (lambda it: it["network"].update(colour="red"), "network.colour", "Extra inputs"),
    "missing key": (lambda it: it.pop("quality"), "quality", "required"),
    "schema version": (lambda it: it.update(schema_version=2), "schema_version", "1"),
    "name against folder": (lambda it: it.update(name="clock"), "name", "'clock', but the folder says 'compass'"),
    "name": (lambda it: it.update(name="Compass!"), "name", "pattern"),
    "version against folder": (lambda it: it.update(version=2), "version", "2, but the folder says '1'"),
    "version": (lambda it: it.update(version=0), "version", "greater than 0"),
    "huge version": (lambda it: it.update(version=2**31), "version", "2147483647"),
    "label count": (lambda it: it["output"]["labels"].pop(), "manifest.json", "output.labels has 3 entries"),
    "labels without softmax": (lambda it: it["output"].update(activation="none"), "output", "softmax"),
    "feature count": (lambda it: it["network"].update(features=5), "manifest.json", "network.features is 5"),
    "mean length": (lambda it: it["input"]["mean"].pop(), "input.features", "mean needs one number"),
    "std length": (lambda it: it["input"]["std"].append(1.0), "input.features", "std needs one number"),
    "labels twice": (
        lambda it: it["output"].update(labels=["north", "east", "north", "west"]),
        "output.labels",
        "'north' is there more than once",
    ),
    "feature twice": (
        with_features(feature_names=["x", "y", "y"]),
        "input.features.feature_names",
        "'y' is there more than once",
    ),
    "mean beyond float32": (
        with_features(mean=[0.0, 1e39, 0.0]),
        "input.features.mean.1",
        "1e+39 is beyond what float32",
    ),
    "std below float32": (with_features(std=[1.0, 1.0, 1e-60]), "input.features.std.2", "1e-60 is beyond what float32"),
    "std zero": (lambda it: it["input"]["std"].__setitem__(1, 0.0), "input.features.std.1", "greater than 0"),
    "mean not finite": (lambda it: it["input"]["mean"].__setitem__(0, float("nan")), "input.features.mean.0", "finite"),
    "kind of input": (lambda it: it["input"].update(kind="sound"), "input", "sound"),
    "pattern": (lambda it: it.update(pattern="some-to-many"), "pattern", "one-to-one"),
    "cell": (lambda it: it["network"].update(cell="mlp"), "network.cell", "'tanh'"),
    "hidden size": (lambda it: it["network"].update(hidden_size=0), "network.hidden_size", "greater than 0"),
    "huge hidden size": (
        lambda it: it["network"].update(hidden_size=10**9),
        "network",
        "hidden_size is 1000000000, above the limit of 65536",
    ),
    "huge input layer": (
        lambda it: it["network"].update(input_layers=[8, 10**9]),
        "network",
        "input_layers is (8, 1000000000), above the limit of 65536",
    ),
    "percentage": (
        lambda it: it["quality"].update(metric="accuracy, percent", value=195.0),
        "quality.value",
        "195 percent is not between 0 and 100",
    ),
    "percentage below zero": (
        lambda it: it["quality"].update(metric="accuracy, percent", value=-1.0),
        "quality.value",
        "-1 percent is not between 0 and 100",
    ),
    "interval beside the value": (
        lambda it: it["quality"].update(interval_95=[0.1, 0.9]),
        "quality",
        "value is not within interval_95",
    ),
    "percentage of a repeat": (with_repeats("2 seeds", 95.0, 195.0), "repeats.values.1", "195 percent is not between"),
    "number of repeats": (with_repeats("5 folds by person", 95.0, 96.0), "repeats.values", "2, but repeats.over says"),
    "label of a sample": (
        lambda it: it.update(samples=[it["samples"][0] | {"label": "up"}], pattern="many-to-one"),
        "manifest.json",
        "samples.0.label is 'up', which is none of output.labels",
    ),
    "huge look-ahead": (lambda it: it.update(look_ahead=1_001), "look_ahead", "less than or equal to 1000"),
    "look-ahead before the answer": (lambda it: it.update(look_ahead=-1), "look_ahead", "greater than or equal to 0"),
    "look-ahead of both directions": (
        lambda it: (it.update(look_ahead=1), it["network"].update(direction="bidirectional")),
        "manifest.json",
        "look_ahead is for networks that stream: a bidirectional network reads the sequence from both ends",
    ),
    "rewrites of numbers": (
        lambda it: it["output"].update(rewrites={"c": "ç"}),
        "manifest.json",
        'output.rewrites goes with a text and the pattern "many-to-many aligned"',
    ),
    "digest": (lambda it: it.update(weights_sha256="0" * 64), "weights_sha256", "another digest"),
    "digest form": (lambda it: it.update(weights_sha256="xyz"), "weights_sha256", "pattern"),
    "sample outside": (lambda it: it["samples"][0].update(file="../secret.csv"), "samples.0.file", "pattern"),
}


@pytest.mark.parametrize("name", WRONG_MANIFESTS)
def test_a_wrong_manifest_is_refused_by_its_field(folder: Path, name: str) -> None:
    edit, field, problem = WRONG_MANIFESTS[name]
    edit_manifest(folder, edit)
    assert_refused(folder, field, problem)


CHANGES: dict[str, Callable[[Json], object]] = {
    "readout": lambda it: it["network"].update(readout="mean"),
    "order of labels": lambda it: it["output"]["labels"].reverse(),
    "normalisation": lambda it: it["input"]["mean"].reverse(),
    "quality": lambda it: it["quality"].update(value=1.0),
    "no digest": lambda it: it.pop("manifest_sha256"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_that_was_changed_is_refused_with_the_digest_that_would_fit(folder: Path, name: str) -> None:
    change_manifest(folder, CHANGES[name])
    digest = manifest_digest((folder / "manifest.json").read_text())
    assert_refused(folder, "manifest_sha256", digest)
    change_manifest(folder, lambda content: content.update(manifest_sha256=digest))
    assert load_bundle(folder).manifest.manifest_sha256 == digest


def test_a_manifest_may_be_laid_out_otherwise(folder: Path) -> None:
    file = folder / "manifest.json"
    fields = reversed(json.loads(file.read_text()).items())
    file.write_text(json.dumps(dict(fields), indent=8))
    assert load_bundle(folder).manifest.key == ("compass", 1)


def test_repeats_that_are_as_many_as_they_say_are_accepted(folder: Path) -> None:
    edit_manifest(folder, with_repeats("2 seeds", 95.0, 97.0))
    repeats = load_bundle(folder).manifest.repeats
    assert repeats is not None
    assert repeats.mean == 96.0


def test_a_network_that_is_larger_than_memory_is_refused_before_it_is_built(folder: Path) -> None:
    edit_manifest(folder, lambda it: it["network"].update(cell="lstm", hidden_size=2**16, layers=16))
    assert_refused(folder, "weights.safetensors", "but the manifest asks for (4, 65536)")


def with_nan(tensors: Tensors) -> None:
    tensors["output.weight"][1, 2] = float("nan")


WRONG_WEIGHTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda it: it.pop("output.bias"), "output.bias is missing"),
    "foreign": (lambda it: it.update(extra=torch.ones(1)), "extra is no part of the network"),
    "shape": (lambda it: it.update({"output.bias": torch.ones(5)}), "output.bias has the shape (5,)"),
    "dtype": (lambda it: it.update({"output.bias": torch.ones(4).double()}), "output.bias is torch.float64"),
    "not finite": (with_nan, "output.weight holds a value that is not finite"),
}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights_are_refused_by_their_tensor(folder: Path, name: str) -> None:
    edit, problem = WRONG_WEIGHTS[name]
    edit_weights(folder, edit)
    assert_refused(folder, "weights.safetensors", problem)


def test_weights_of_a_type_that_torch_does_not_know_are_refused(folder: Path) -> None:
    header = json.dumps({"output.bias": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}).encode()
    header += b" " * (-len(header) % 8)
    write_weights(folder, struct.pack("<Q", len(header)) + header + bytes(4))
    assert_refused(folder, "weights.safetensors", "F4, neither float32 nor float16")


def test_weights_that_end_too_soon_are_refused(folder: Path) -> None:
    write_weights(folder, (folder / "weights.safetensors").read_bytes()[:-7])
    assert_refused(folder, "weights.safetensors", "")


def test_a_flipped_bit_is_refused(folder: Path) -> None:
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert_refused(folder, "weights_sha256", "damaged")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "samples/one.csv cannot be read"),
        ("a,b,c\n1,2,x\n", "samples/one.csv cannot be read"),
        ("a,b\n1,2\n", "samples/one.csv holds no steps that the network reads"),
    ],
)
def test_a_missing_or_wrong_sample_is_refused(folder: Path, content: str | None, problem: str) -> None:
    file = folder / "samples" / "one.csv"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    assert_refused(folder, "samples", problem)


@pytest.mark.parametrize(("text", "is_refused"), [("so they\nso\n", False), ("so him", True), (" \n", True)])
def test_a_sample_of_words_must_be_one_that_the_network_reads(tmp_path: Path, text: str, is_refused: bool) -> None:
    spec = NetworkSpec(cell="gru", symbols=2, embedding_size=3, hidden_size=4, outputs=2)
    inputs = TextInput(unit="word", symbols=("so", "they"))
    sample = Sample(file="samples/one.txt", label="", description="a sentence")
    described = manifest("words", spec, inputs).model_copy(update={"samples": (sample,)})
    folder = save_bundle(tmp_path, described, RecurrentNetwork(spec))
    (folder / "samples").mkdir()
    (folder / "samples" / "one.txt").write_text(text)
    if is_refused:
        assert_refused(folder, "samples", "samples/one.txt holds no steps that the network reads")
    else:
        assert load_bundle(folder).samples == ("so they\nso",)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(3)
    spec = NetworkSpec(cell="lstm", symbols=2, embedding_size=3, hidden_size=4, transition_layers=2, outputs=2)
    network = RecurrentNetwork(spec)
    described = manifest("text", spec, TextInput(symbols=("a", "ü")), version=7)
    folder = save_bundle(tmp_path, described, network)
    assert folder == tmp_path / "text" / "7"
    loaded = load_bundle(folder)
    digests = {
        "weights_sha256": hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest(),
        "manifest_sha256": manifest_digest((folder / "manifest.json").read_text()),
    }
    assert loaded.manifest == described.model_copy(update=digests)
    found = loaded.predictor.network.state_dict()
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in network.state_dict().items())


def test_weights_that_float16_holds_take_half_the_room_and_are_loaded_as_float32(tmp_path: Path) -> None:
    network = RecurrentNetwork(NetworkSpec(cell="gru", features=3, hidden_size=16, outputs=4))
    described = manifest("compass", network.spec, features(3), labels=LABELS)
    exact = save_bundle(tmp_path / "exact", described, network) / "weights.safetensors"
    round_weights(network)
    folder = save_bundle(tmp_path / "rounded", described, network)
    numbers = parameters_of(network.spec)
    saved_bytes = exact.stat().st_size - (folder / "weights.safetensors").stat().st_size
    assert saved_bytes == pytest.approx(2 * numbers, abs=64)
    loaded = load_bundle(folder).predictor.network.state_dict()
    for name, weights in network.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], weights)
