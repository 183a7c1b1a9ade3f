"""Each example runs as it stands, and a caller's types are checked."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import ROOT, RunningServer

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "gateway.py": ["steps/s; now:"],
    "handle_errors.py": ["MODEL_NOT_STREAMABLE", "step 0:", "NOT_FINITE at 0"],
    "many_streams.py": ["speaker-9:", "right"],
    "predict_sequences.py": ["likely: speaker", "right"],
    "stream_sensor.py": ["after 3 s:", "it truly is"],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_runs_as_it_stands(example: Path, trained_server: RunningServer) -> None:
    done = subprocess.run([sys.executable, example, trained_server.target], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    for part in SAYS[example.name]:
        assert part in done.stdout


def test_examples_pass_the_strict_type_check_of_a_caller(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, "--config-file", "", *EXAMPLES],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
