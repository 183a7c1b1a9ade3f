"""Sequences from short to an hour at 100 steps a second through a bidirectional LSTM: time and memory.

    python -m benchmarks.recording --steps 10 1000 360000

Each length goes once through `predict_many`, which sends it whole where it fits into a message, else in parts. What
goes in parts goes once more, and is cancelled when half of it is computed: "gone" is the time from then until the
process that computes has none of its files any more. Memory is the most of some hundred looks a second, from
/proc/<pid>/status: anonymous, and pages of files, which the kernel may take back at any time; of the service, both.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.network import FEATURES, HIDDEN_SIZE, MODEL
from benchmarks.plots import draw_recordings
from benchmarks.report import machine, markdown
from benchmarks.sequence_report import LAYERS
from benchmarks.sequences import write_network
from rnnserve import Client
from rnnserve.tensors import Array
from tests.support.recordings import spilled_bytes
from tests.support.server import RunningServer, start_server

STEPS = (10, 100, 1_000, 10_000, 60_000, 360_000)
LOOK_S = 0.01
WAIT_S = 3_600.0
HEAD = (
    "steps", "s", "µs/step", "worker, anonymous MiB", "worker, files MiB", "service MiB", "on disk MiB", "gone, ms",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Of a process, in MiB."""

    anonymous_mib: float
    files_mib: float

    def most(self, other: Memory) -> Memory:
        return Memory(max(self.anonymous_mib, other.anonymous_mib), max(self.files_mib, other.files_mib))


@dataclass(frozen=True)
class Row:
    """One length."""

    steps: int
    duration_s: float
    worker: Memory
    service: Memory
    spilled_mib: float
    gone_s: float | None  # None = it had no files

    @property
    def us_per_step(self) -> float:
        return self.duration_s / self.steps * 1e6

    def cells(self) -> list[str]:
        return [
            f"{self.steps:,}", f"{self.duration_s:.3f}", f"{self.us_per_step:.1f}", f"{self.worker.anonymous_mib:.0f}",
            f"{self.worker.files_mib:.0f}", f"{self.service.anonymous_mib + self.service.files_mib:.0f}",
            f"{self.spilled_mib:.0f}", "" if self.gone_s is None else f"{self.gone_s * 1e3:.0f}",
        ]  # fmt: skip


def memory_of(pid: int) -> Memory:
    """Now."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kib = {fields[0]: int(fields[1]) for fields in lines if fields[0] in ("RssAnon:", "RssFile:", "RssShmem:")}
    return Memory(kib["RssAnon:"] / 1024, (kib["RssFile:"] + kib["RssShmem:"]) / 1024)


class Watch:
    """Looks at the processes of a server again and again."""

    def __init__(self, server: RunningServer, spill_dir: Path) -> None:
        self._pids = server.lane_pid(), server.process.pid
        self._spill_dir = spill_dir
        self.worker, self.service = map(memory_of, self._pids)
        self.spilled_bytes = 0

    @contextmanager
    def looking(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._look, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _look(self, stop: threading.Event) -> None:
        while not stop.wait(LOOK_S):
            worker, service = map(memory_of, self._pids)
            self.worker, self.service = self.worker.most(worker), self.service.most(service)
            self.spilled_bytes = max(self.spilled_bytes, spilled_bytes(self._spill_dir, self._pids[0]))


def values_of(steps: int) -> Array:
    """Random ones."""
    return np.random.default_rng(0).normal(size=(steps, FEATURES)).astype(np.float32)


def measure(steps: int, folder: Path, progress: Progress) -> Row:
    """In a server of its own, so that no length knows of those before it."""
    spill_dir = folder / str(steps)
    spill_dir.mkdir()
    with (
        start_server(folder / "repository", spill_dir=spill_dir) as server,
        Client(server.target, timeout_s=WAIT_S) as client,
    ):
        list(client.predict_many(MODEL, [values_of(64)]))  # what is only done once
        values, watch = values_of(steps), Watch(server, spill_dir)
        task = progress.add_task(f"{steps:,} steps", total=2.0)
        with watch.looking():
            start_s = time.perf_counter()
            (prediction,) = client.predict_many(
                MODEL, [values], on_progress=lambda _, share: progress.update(task, completed=share)
            )
            duration_s = time.perf_counter() - start_s
        if len(prediction.outputs) != steps or not np.isfinite(prediction.outputs).all():
            raise RuntimeError(f"{steps} steps were answered by {len(prediction.outputs)}")
        gone_s = cancel(client, values, server.lane_pid(), spill_dir)
        progress.update(task, completed=2.0)
    return Row(steps, duration_s, watch.worker, watch.service, watch.spilled_bytes / 2**20, gone_s)


class _Half(Exception):
    """Of it is computed, at this moment."""


def cancel(client: Client, values: Array, pid: int, spill_dir: Path) -> float | None:
    """From the moment that the caller wants no more until there are no files."""

    def stop(_: int, share: float) -> None:
        if share >= 0.5:
            raise _Half(time.perf_counter())

    try:
        list(client.predict_many(MODEL, [values], on_progress=stop))
    except _Half as half:
        while spilled_bytes(spill_dir, pid):
            time.sleep(0.0005)
        return time.perf_counter() - float(half.args[0])
    return None


def write(folder: Path, rows: list[Row], command: str) -> None:
    """recording.json, recording.md and recording.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"command": command, "machine": machine(), "rows": [asdict(row) for row in rows]}
    (folder / "recording.json").write_text(json.dumps(data, indent=1) + "\n")
    parts = [
        "# What `python -m benchmarks.recording` has measured",
        f"`{command}` on {machine()}.",
        f"Bidirectional LSTM of {LAYERS} layers, {FEATURES} features, {HIDDEN_SIZE} units in each direction, random "
        "weights, one torch thread.",
        markdown(HEAD, [row.cells() for row in rows]),
        "![time and memory](recording.svg)",
    ]
    (folder / "recording.md").write_text("\n\n".join(parts) + "\n")
    draw_recordings(folder / "recording.svg", rows)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recording", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--into", type=Path, help="write recording.json, recording.md and recording.svg there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        write_network(Path(folder) / "repository")
        rows = [measure(steps, Path(folder), progress) for steps in given.steps]
    print(markdown(HEAD, [row.cells() for row in rows]))
    if given.into:
        write(given.into, rows, f"python -m benchmarks.recording --steps {' '.join(map(str, given.steps))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
