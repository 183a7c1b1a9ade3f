import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from models.bundle import BundleError, load_bundle, save_bundle
from models.manifest import TextInput
from models.recurrent import NetworkSpec, RecurrentNetwork
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


WRONG_MANIFESTS: dict[str, tuple[Callable[[Json], object], str, str]] = {
    "unknown key": (lambda it: it.update(colour="red"), "colour", "Extra inputs"),
    "unknown key inside": (lambda it: it["network"].update(colour="red"), "network.colour", "Extra inputs"),
    "missing key": (lambda it: it.pop("quality"), "quality", "required"),
    "schema version": (lambda it: it.update(schema_version=2), "schema_version", "1"),
    "name against folder": (lambda it: it.update(name="clock"), "name", "'clock', but the folder says 'compass'"),
    "name": (lambda it: it.update(name="Compass!"), "name", "pattern"),
    "version against folder": (lambda it: it.update(version=2), "version", "2, but the folder says '1'"),
    "version": (lambda it: it.update(version=0), "version", "greater than 0"),
    "label count": (lambda it: it["output"]["labels"].pop(), "manifest.json", "output.labels has 3 entries"),
    "labels without softmax": (lambda it: it["output"].update(activation="none"), "output", "softmax"),
    "feature count": (lambda it: it["network"].update(features=5), "manifest.json", "network.features is 5"),
    "mean length": (lambda it: it["input"]["mean"].pop(), "input.features", "mean needs one number"),
    "std length": (lambda it: it["input"]["std"].append(1.0), "input.features", "std needs one number"),
    "std zero": (lambda it: it["input"]["std"].__setitem__(1, 0.0), "input.features.std.1", "greater than 0"),
    "mean not finite": (lambda it: it["input"]["mean"].__setitem__(0, float("nan")), "input.features.mean.0", "finite"),
    "kind of input": (lambda it: it["input"].update(kind="sound"), "input", "sound"),
    "pattern": (lambda it: it.update(pattern="some-to-many"), "pattern", "one-to-one"),
    "cell": (lambda it: it["network"].update(cell="mlp"), "network.cell", "'tanh'"),
    "hidden size": (lambda it: it["network"].update(hidden_size=0), "network.hidden_size", "greater than 0"),
    "look-ahead": (lambda it: it.update(look_ahead=5), "look_ahead", "0"),
    "digest": (lambda it: it.update(weights_sha256="0" * 64), "weights_sha256", "another digest"),
    "digest form": (lambda it: it.update(weights_sha256="xyz"), "weights_sha256", "pattern"),
    "sample outside": (lambda it: it["samples"][0].update(file="../secret.csv"), "samples.0.file", "pattern"),
}


@pytest.mark.parametrize("name", WRONG_MANIFESTS)
def test_a_wrong_manifest_is_refused_by_its_field(folder: Path, name: str) -> None:
    edit, field, problem = WRONG_MANIFESTS[name]
    edit_manifest(folder, edit)
    assert_refused(folder, field, problem)


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


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(3)
    spec = NetworkSpec(cell="lstm", symbols=2, embedding_size=3, hidden_size=4, transition_layers=2, outputs=2)
    network = RecurrentNetwork(spec)
    described = manifest("text", spec, TextInput(symbols=("a", "ü")), version=7)
    folder = save_bundle(tmp_path, described, network)
    assert folder == tmp_path / "text" / "7"
    loaded = load_bundle(folder)
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert loaded.manifest == described.model_copy(update={"weights_sha256": digest})
    found = loaded.predictor.network.state_dict()
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in network.state_dict().items())
