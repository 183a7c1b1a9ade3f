"""A trained network on disk: `<name>/<version>/` with manifest.json and weights.safetensors, never pickle."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from models.manifest import FeatureInput, Manifest, Sample, TextInput, UnknownSymbolError, manifest_digest
from models.predictor import Predictor
from models.recurrent import RecurrentNetwork
from models.samples import read_sample
from models.seq2seq import network_of

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


class BundleError(ValueError):
    """A bundle that must not be served. `field` names the part that is wrong."""

    def __init__(self, folder: Path, field: str, problem: str) -> None:
        super().__init__(folder, field, problem)  # as they are, so that it can pass from process to process
        self.folder, self.field, self.problem = folder, field, problem

    def __str__(self) -> str:
        return f"bundle {self.folder}: {self.field}: {self.problem}"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle, ready to predict."""

    folder: Path
    manifest: Manifest
    predictor: Predictor
    samples: tuple[NDArray[np.float32] | str, ...]
    """The values of each of the manifest's samples, in their order: (steps, features), or a text."""
    load_s: float = 0.0
    """How long it took to read and verify."""

    @property
    def weights_bytes(self) -> int:
        """In memory."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.predictor.network.parameters())


def load_bundle(folder: Path) -> Bundle:
    """Read and verify `<name>/<version>/`.

    Raises BundleError if a file is missing or unreadable, the manifest does not fit its schema, its folder or its
    digest, the weights do not fit theirs or the network, or a sample is none that the network reads.
    """
    start_s = time.perf_counter()
    manifest = load_manifest(folder)
    weights = _read(folder, WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != manifest.weights_sha256:
        raise BundleError(
            folder, "weights_sha256", f"{WEIGHTS} has another digest, so it is damaged or not the one meant"
        )
    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise BundleError(folder, WEIGHTS, str(error)) from None
    except KeyError as error:  # a type that safetensors knows and torch does not
        raise BundleError(folder, WEIGHTS, f"a tensor is {error.args[0]}, neither float32 nor float16") from None
    with torch.device("meta"):  # shapes alone: what a wrong manifest asks for may be more than there is memory
        wanted = network_of(manifest.network).state_dict()
    _check_weights(folder, tensors, wanted)
    network = network_of(manifest.network)
    network.load_state_dict(tensors)
    samples = tuple(_read_sample(folder, sample, manifest) for sample in manifest.samples)
    predictor = Predictor(network.eval(), manifest.input, look_ahead=manifest.look_ahead)
    return Bundle(folder, manifest, predictor, samples, time.perf_counter() - start_s)


def load_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` alone. Raises BundleError."""
    text = _read(folder, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or MANIFEST
        raise BundleError(folder, field, first["msg"].removeprefix("Value error, ")) from None
    if manifest.name != folder.parent.name:
        raise BundleError(folder, "name", f"is {manifest.name!r}, but the folder says {folder.parent.name!r}")
    if str(manifest.version) != folder.name:
        raise BundleError(folder, "version", f"is {manifest.version}, but the folder says {folder.name!r}")
    digest = manifest_digest(text)
    if digest != manifest.manifest_sha256:
        raise BundleError(
            folder,
            "manifest_sha256",
            f"{MANIFEST} says something else than when it was written; if that is meant, put {digest} here",
        )
    return manifest


def save_bundle(repository: Path, manifest: Manifest, network: RecurrentNetwork) -> Path:
    """Write manifest and weights to `<repository>/<name>/<version>/` and return that folder.

    The digests in the manifest are set here, whatever they were. Weights that float16 holds exactly take half the room.
    """
    folder = repository / manifest.name / str(manifest.version)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: _as_small_as_exact(tensor.contiguous()) for name, tensor in network.state_dict().items()})
    manifest = manifest.model_copy(update={"weights_sha256": hashlib.sha256(weights).hexdigest()})
    (folder / WEIGHTS).write_bytes(weights)
    write_manifest(folder, manifest)
    return folder


def _as_small_as_exact(tensor: torch.Tensor) -> torch.Tensor:
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with the digest of what it says."""
    digest = manifest_digest(manifest.model_dump_json())
    manifest = manifest.model_copy(update={"manifest_sha256": digest})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(folder, name, error.strerror or "cannot be read") from None


def _check_weights(folder: Path, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise BundleError(folder, WEIGHTS, f"{name} is missing")
        if name not in wanted:
            raise BundleError(folder, WEIGHTS, f"{name} is no part of the network that the manifest describes")
        if found[name].shape != wanted[name].shape:
            shapes = f"{tuple(found[name].shape)}, but the manifest asks for {tuple(wanted[name].shape)}"
            raise BundleError(folder, WEIGHTS, f"{name} has the shape {shapes}")
        if found[name].dtype not in (torch.float32, torch.float16):
            raise BundleError(folder, WEIGHTS, f"{name} is {found[name].dtype}, neither float32 nor float16")
        if not bool(torch.isfinite(found[name]).all()):
            raise BundleError(folder, WEIGHTS, f"{name} holds a value that is not finite")


def _read_sample(folder: Path, sample: Sample, manifest: Manifest) -> NDArray[np.float32] | str:
    try:
        values = read_sample(folder, sample)
    except (OSError, ValueError) as error:
        raise BundleError(folder, "samples", f"{sample.file} cannot be read: {error}") from None
    if not _readable_steps(values, manifest.input):
        raise BundleError(folder, "samples", f"{sample.file} holds no steps that the network reads")
    return values


def _readable_steps(values: NDArray[np.float32] | str, spec: FeatureInput | TextInput) -> int:
    """How many there are; 0 if one of them is none that the network reads."""
    if isinstance(values, str):
        try:
            return len(spec.encode(values)) if isinstance(spec, TextInput) else 0
        except UnknownSymbolError:
            return 0
    return len(values) if isinstance(spec, FeatureInput) and values.shape[1] == len(spec.feature_names) else 0
