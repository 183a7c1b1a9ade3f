"""What the project's containers are tried with."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.server import ROOT

TIMEOUT_S = 900

Compose = Callable[..., str]
"""Runs `docker compose` with these words, for a project of the test's own; what it prints."""


def compose_works() -> bool:
    """A Docker engine runs, and its compose plugin is there."""
    return shutil.which("docker") is not None and all(
        subprocess.run(["docker", *words], capture_output=True).returncode == 0
        for words in (["compose", "version"], ["info"])
    )


def docker(*words: str) -> str:
    """What the command prints; it must succeed."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def composed(project: str, override: Path, *up: str, profile: str = "") -> Iterator[Compose]:
    """The project's containers with this override, up within the block, as the words of `up` say."""
    files = ("--file", str(ROOT / "docker-compose.yml"), "--file", str(override))
    profiles = ("--profile", profile) if profile else ()

    def run(*words: str) -> str:
        return docker("compose", "--project-name", project, *files, *profiles, *words)

    try:
        run(*up)
        yield run
    finally:
        run("down", "--volumes")
