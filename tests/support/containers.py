"""What the project's containers are tried with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.server import ROOT

TIMEOUT_S = 900
CHANGED_S = 90.0  # until all of them know what has changed

only_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root may kill what runs in a container"
)

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


def described(container: str, what: str) -> str:
    """Of `docker inspect`, by its path, such as ".State.Pid"."""
    return docker("inspect", "--format", f"{{{{{what}}}}}", container).strip()


def page(container: str, address: str) -> str:
    """What it answers to HTTP at this port and path."""
    host = described(container, "range .NetworkSettings.Networks}}{{.IPAddress}}{{end")
    with urllib.request.urlopen(f"http://{host}:{address}", timeout=5.0) as answer:
        return str(answer.read().decode())


def told_by_prometheus(container: str, path: str) -> dict[str, Any]:
    """The data of an answer of its API."""
    data: dict[str, Any] = json.loads(page(container, f"9090/api/v1/{path}"))["data"]
    return data


def until(true: Callable[[], bool]) -> None:
    """It is, which must not take too long."""
    until_s = time.monotonic() + CHANGED_S
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.05)


@contextmanager
def composed(
    project: str, override: Path, *up: str, profile: str = "", before: tuple[str, ...] = ()
) -> Iterator[Compose]:
    """The project's containers with this override, up within the block, as the words of `up` say.

    `before` is what compose does first, if anything.
    """
    files = ("--file", str(ROOT / "docker-compose.yml"), "--file", str(override))
    profiles = ("--profile", profile) if profile else ()

    def run(*words: str) -> str:
        return docker("compose", "--project-name", project, *files, *profiles, *words)

    try:
        if before:
            run(*before)
        run(*up)
        yield run
    finally:
        run("down", "--volumes")
