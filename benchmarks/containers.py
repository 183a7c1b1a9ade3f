"""How large the image and the client are, how soon a container answers, and how long a stream waits when it is killed.

    python -m benchmarks.containers --into docs/operations

Needs Docker with compose, the image, and root, who may kill what runs in a container. Writes what it finds between two
marks of containers.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import markdown
from rnnserve import Client, RetryPolicy
from tests.support.containers import Compose, composed, described, docker
from tests.support.server import ROOT, free_port

IMAGE = "rnnserve:0.1.0"
BASE = "python:3.11-slim"
PROJECT = "rnnserve-measured"
MODEL = "activity"
SMALL_MB = 1.0  # what is smaller is added up
START_TIMEOUT_S = 120.0
PATIENT = RetryPolicy(attempts=1_000, first_backoff_s=0.1, max_backoff_s=0.1)  # enough for START_TIMEOUT_S
BEGIN, END = "<!-- measured by python -m benchmarks.containers -->\n", "<!-- until here -->\n"

Lines = list[tuple[str, str]]


def layers() -> Lines:
    """Of the image: the base, and each of ours that has a size."""
    base, whole = (int(described(image, ".Size")) for image in (BASE, IMAGE))
    found = docker("history", "--no-trunc", "--human=false", "--format", "{{json .}}", IMAGE).splitlines()
    ours: Lines = []
    for layer in map(json.loads, reversed(found)):
        made = re.sub(r"\s+", " ", re.sub(r"^.*/bin/sh -c |# buildkit$", "", layer["CreatedBy"])).strip()
        if int(layer["Size"]) >= 1e5 and made.startswith("COPY"):
            ours.append((f"`{made}`", _mb(int(layer["Size"]))))
    return [
        (f"base, {BASE}", _mb(base)), *ours, ("ours, all layers", _mb(whole - base)), ("image", _mb(whole)),
    ]  # fmt: skip


def packages_in_image() -> Lines:
    """What is in its virtual environment."""
    size = "du --block-size=1 --summarize --apparent-size"  # of folders within one another it would count only one
    command = f"{size} /opt/venv && {size} /opt/venv/lib/python3*/site-packages/*"
    return _largest(docker("run", "--rm", IMAGE, "sh", "-c", command), least_mb=10.0)


def client() -> Lines:
    """Its wheel alone, installed alone, and installed with what it needs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        pip = [str(folder / "venv/bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
        (wheel,) = folder.glob("*.whl")
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        _run([*pip, "install", *constraints, "--no-deps", "--target", str(folder / "alone"), str(wheel)])
        _run([*pip, "install", *constraints, "--target", str(folder / "all"), str(wheel)])
        sizes = _run(["du", "--block-size=1", "--summarize", "--apparent-size", *map(str, (folder / "all").iterdir())])
        return [
            ("wheel", _mb(wheel.stat().st_size)),
            ("installed, without what it needs", _mb(_size(folder / "alone"))),
            *(
                (what.replace("with all", "installed, with all that it needs"), much)
                for what, much in _largest(f"{_size(folder / 'all')} with all\n{sizes}")
            ),
        ]


def _largest(sizes: str, least_mb: float = SMALL_MB) -> Lines:
    """Of lines with bytes and a path; the first is the whole."""
    read = [line.split(maxsplit=1) for line in sizes.splitlines()]
    (whole, name), *found = [(int(size), path.rpartition("/")[2]) for size, path in read]
    named = sorted(((size, part) for size, part in found if size >= least_mb * 1e6), reverse=True)
    rest = whole - sum(size for size, _ in named)
    return [
        (name, _mb(whole)),
        *((f"of that {part}", _mb(size)) for size, part in named),
        ("of that the rest", _mb(rest)),
    ]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def service() -> Iterator[tuple[Compose, int, float]]:
    """The service alone, made anew; its port, and when `docker compose up` was called."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        override = Path(folder) / "ports.yml"
        override.write_text(f'services: {{rnnserve: {{ports: !override ["127.0.0.1:{port}:50051"]}}}}\n')
        began_s = time.monotonic()
        with composed(PROJECT, override, "up", "--detach", "--no-build", "rnnserve") as compose:
            yield compose, port, began_s


def first_step_and_resume() -> tuple[float, float]:
    """Seconds from `docker compose up` to the first answer; and from a kill to the next answer of that stream."""
    with (
        service() as (compose, port, began_s),
        Client(f"127.0.0.1:{port}", timeout_s=START_TIMEOUT_S, retry=PATIENT) as client,
    ):
        features = len(client.model(MODEL).features)
        with client.stream(MODEL) as stream:
            stream.step([0.0] * features)
            first_s = time.monotonic() - began_s
            container = compose("ps", "--quiet", "rnnserve").strip()
            os.kill(int(described(container, ".State.Pid")), signal.SIGKILL)
            killed_s = time.monotonic()
            answer = stream.step([0.0] * features)
            if answer.step != 1:
                raise RuntimeError(f"the answer after the kill is about step {answer.step}, not 1")
            return first_s, time.monotonic() - killed_s


def times(turns: int) -> Lines:
    """The median over the turns, and the slowest."""
    measured = [first_step_and_resume() for _ in track(range(turns), "up, killed, down", console=Console(stderr=True))]
    names = ("from `docker compose up` to the first answered step", "from the kill to the stream's next answer")
    columns = zip(*measured, strict=True)
    return [
        (name, f"{median(column):.1f} s (slowest {max(column):.1f} s)")
        for name, column in zip(names, columns, strict=True)
    ]


def text(tables: Sequence[tuple[str, str, Lines]], turns: int) -> str:
    """For containers.md."""
    cores = len(os.sched_getaffinity(0))
    parts = [
        f"On {cores} shared cores, with other work beside it. {BASE} was a stand-in of the same name, Debian's own\n"
        "Python 3.11: the official image has another size, so ours are given apart from it. 1 MB is 10⁶ bytes.\n"
        f"Times are the median of {turns} turns, each with fresh volumes, image and files in memory; the kill is a\n"
        "SIGKILL from outside, after which Docker starts the container again.",
        *(f"{title}\n\n{markdown((head, 'measured'), lines)}" for title, head, lines in tables),
    ]
    return "\n" + "\n\n".join(parts) + "\n\n"


def write(file: Path, measured: str) -> None:
    """Between the marks."""
    before, _, rest = file.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    file.write_text(before + BEGIN + measured + END + after)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--into", type=Path, help="write into containers.md there")
    given = parser.parse_args()
    tables = [
        ("Image, by layer:", "layer", layers()),
        ("What its packages are (torch needs `sympy` and `networkx`):", "in /opt/venv", packages_in_image()),
        (
            "The client, with what Python compiles of it at its installation (`typer` needs `pydantic`). "
            "numpy and grpc, without\nwhich there is no client for arrays over gRPC, are more than 40 MB alone:",
            "client",
            client(),
        ),
        ("Times:", "what", times(given.turns)),
    ]
    for title, head, lines in tables:
        table = Table(head, "measured", title=title)
        for line in lines:
            table.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    if given.into:
        write(given.into / "containers.md", text(tables, given.turns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
