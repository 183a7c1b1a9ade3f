"""The network of `make bench`: an LSTM of 32 features and 256 units; random weights cost what trained ones do."""

from __future__ import annotations

from pathlib import Path

from models.bundle import Bundle
from models.manifest import FeatureInput
from models.recurrent import NetworkSpec
from tests.support.bundles import manifest, write_bundle

MODEL = "benchmark"
FEATURES, HIDDEN_SIZE, OUTPUTS = 32, 256, 16


def features() -> FeatureInput:
    """Already normalised."""
    names = tuple(f"feature {number}" for number in range(FEATURES))
    return FeatureInput(feature_names=names, mean=(0.0,) * FEATURES, std=(1.0,) * FEATURES)


def write_network(repository: Path) -> Bundle:
    """Into a repository of its own."""
    spec = NetworkSpec(cell="lstm", features=FEATURES, hidden_size=HIDDEN_SIZE, outputs=OUTPUTS)
    return write_bundle(repository, manifest(MODEL, spec, features()))


def weights_file(repository: Path) -> Path:
    """Where they are."""
    return repository / MODEL / "1" / "weights.safetensors"
