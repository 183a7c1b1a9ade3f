"""Every shell and Python block of the README and the course runs as it is written, in one server of `make serve`.

Only the port is another one, so that a server that runs already is left alone.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.containers import compose_works
from tests.support.server import ROOT, wait_for_ports

PAGES = ("README.md", "docs/course.md")
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```(sh|python)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
]
SERVE = "make serve\n"
TIMEOUT_S = 300


def first_line(block: tuple[str, str]) -> str:
    return block[1].splitlines()[0]


def is_compose(block: tuple[str, str]) -> bool:
    return "docker compose" in block[1]


TRIED = [block for block in BLOCKS if block[1] != SERVE and not is_compose(block)]


@dataclass(frozen=True)
class Terminal:
    """A newcomer's second terminal."""

    port: int

    def run(self, language: str, text: str) -> str:
        text = text.replace("localhost:50051", f"localhost:{self.port}")
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as `source .venv/bin/activate` makes it
        variables = os.environ | {"RNNSERVE_TARGET": f"localhost:{self.port}", "PATH": path}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """The README's own command serves, on free ports."""
    folder: Path = tmp_path_factory.mktemp("readme")
    ports = {"RNNSERVE_PORT": "0", "RNNSERVE_METRICS_PORT": "0", "RNNSERVE_STATE_DIR": str(folder)}
    log_file = folder / "server.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", SERVE], cwd=ROOT, env=os.environ | ports, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield Terminal(wait_for_ports(process, folder / "server.json", log_file)["port"])
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_the_readme_says_how_to_serve() -> None:
    assert ("sh", SERVE) in BLOCKS
    assert len(TRIED) >= 6


@pytest.mark.parametrize("block", TRIED, ids=[f"{i} {first_line(block)}" for i, block in enumerate(TRIED)])
@pytest.mark.xdist_group("readme")
def test_a_block_of_the_readme_runs_as_written(block: tuple[str, str], terminal: Terminal) -> None:
    assert terminal.run(*block).strip()


@pytest.mark.skipif(not compose_works(), reason="no Docker engine with compose runs here")
def test_the_containers_of_the_readme_come_up_as_written() -> None:
    (block,) = filter(is_compose, BLOCKS)
    Terminal(50051).run(*block)


@pytest.mark.xdist_group("readme")
def test_what_stands_behind_a_command_of_the_course_is_what_it_prints(terminal: Terminal) -> None:
    ((command, printed),) = re.findall(
        r"^(rnnserve predict .*?) +# (.+)$", (ROOT / "docs" / "course.md").read_text(), re.MULTILINE
    )
    assert printed in terminal.run("sh", command)
