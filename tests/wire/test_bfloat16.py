"""Live steps and whole sequences with bfloat16 weights, in a service of one process and in one of several."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.bfloat16 import Bfloat16Loss, write_loss
from models.bundle import load_bundle
from rnnserve import BundleInvalid, Client
from tests.support.reference import Reference
from tests.support.server import start_server


@pytest.mark.parametrize("workers", [1, 2])
def test_live_steps_and_whole_sequences_are_rounded(repository: Path, tmp_path: Path, workers: int) -> None:
    folder = shutil.copytree(repository / "vanilla" / "1", tmp_path / "vanilla" / "1")
    measured = load_bundle(folder).manifest.manifest_sha256
    write_loss(
        folder,
        Bfloat16Loss(manifest_sha256=measured, predictions=2_000, float32_percent=90.0, bfloat16_percent=90.0),
    )
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    with (
        start_server(tmp_path, workers=workers, bfloat16_models="vanilla") as server,
        Client(server.target) as client,
    ):
        with client.stream("vanilla") as stream:
            live = np.array([stream.step(x).output for x in values])
        (whole,) = client.predict("vanilla", [values], steps="all")
        exact = Reference(folder).predict(values)
        for outputs in (live, whole.outputs):
            assert outputs.dtype == np.float32
            np.testing.assert_allclose(outputs, exact, atol=0.02)
            assert np.abs(outputs - exact).max() > 1e-4
        shutil.copytree(repository / "vanilla" / "2", tmp_path / "vanilla" / "2")
        with pytest.raises(BundleInvalid, match=r"bfloat16\.json: .* never measured"):
            client.load_model("vanilla", 2)
