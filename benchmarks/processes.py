"""Servers that benchmarks measure: pinned to a core, ended with the block, and how much CPU they have used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.support.server import COMMITTED_REPOSITORY, RunningServer, start_server

SERVER_CORE, CLIENT_CORE = 0, 1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """What is started in the block runs there, and so does all that it starts itself."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def module_server(module: str, *arguments: object) -> Iterator[tuple[str, int]]:
    """Target and pid of `python -m module arguments`, which prints its port, on the core for servers."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with on_core(SERVER_CORE):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}", process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def pinned_server(
    repository: Path = COMMITTED_REPOSITORY, state_dir: Path | None = None, **settings: object
) -> Iterator[RunningServer]:
    """As `start_server`, with all its processes on the core for servers."""
    with ExitStack() as stack:
        with on_core(SERVER_CORE):
            server = stack.enter_context(start_server(repository, state_dir, **settings))
        yield server


def cpu_s(pid: int) -> float:
    """What a process and all below it that live have used so far, in seconds of a core."""
    used_s = 0.0
    with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        for task in Path(f"/proc/{pid}/task").iterdir():
            used_s += sum(cpu_s(int(child)) for child in (task / "children").read_text().split())
    return used_s


def core_s(core: int) -> float:
    """How long the core has been at work so far, for whomever, in seconds. Raises StopIteration if there is none."""
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    user, nice, system, _idle, _iowait, irq, softirq, *_ = next(f[1:] for f in lines if f[0] == f"cpu{core}")
    return sum(map(int, (user, nice, system, irq, softirq))) / TICKS_PER_S
