"""Several workers: how long streams are away when one is killed or all are renewed, and what the second one costs.

    python -m benchmarks.workers --parts kill roll cpu

- kill: `kill -9` of one of three workers, again and again; from then to the next answer of each of its streams.
- roll: SIGHUP to three workers; the longest that any stream waits for an answer.
- cpu: what the processes of a service use for a step, at the same offered load, in turns. `--workers 2` splits the
  streams, so that fewer share a wakeup and a tick. What the workers themselves cost tell the others: one worker with
  half of the streams, as each of two has; two services without a supervisor; all streams on one connection, which one
  worker has.

In kill and roll the client is ours, each stream has a connection of its own, and each answer proves that no step was
lost or repeated. In cpu the processes of all services are on one core and the client on another.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.live import Load, opened
from benchmarks.open_loop import pace
from benchmarks.processes import CLIENT_CORE, cpu_s, on_core, pinned_server
from rnnserve import AsyncClient, Notice
from tests.support.bundles import write_accumulator
from tests.support.server import RunningServer, start_server
from tests.support.wire import metric

WORKERS = 3
PACES_S = {"kill": (0.05, 0.15), "roll": (0.1, 1.0)}
"""The least and the most between two steps of a stream. In a drain, some are quiet soon and are ended, others never."""
TIMEOUT_S = 120.0


class CountingStream:
    """Sends ones at a pace of its own, verifies every answer, and knows when it was away."""

    def __init__(self, client: AsyncClient, pace_s: float) -> None:
        self._stream = client.stream("accumulator", on_notice=self._told)
        self._pace_s = pace_s
        self.steps = 0
        self.longest_wait_s = 0.0
        self.away = False
        self.back_s: list[float] = []

    def _told(self, notice: Notice) -> None:
        self.away |= notice.reason == "interrupted"

    async def run(self, stop: asyncio.Event) -> None:
        """Raises RuntimeError if a step was lost or repeated."""
        async with self._stream:
            while not stop.is_set():
                await asyncio.sleep(random.uniform(0.9, 1.1) * self._pace_s)
                start_s = time.monotonic()
                answer = await self._stream.step([1.0])
                now_s = time.monotonic()
                count = self.steps + 1
                if (answer.step, *answer.output) != (self.steps, count, count * self.steps / 2):
                    raise RuntimeError(f"after {count} steps {self._stream.session} answers {answer}")
                self.steps = count
                self.longest_wait_s = max(self.longest_wait_s, now_s - start_s)
                if self.away:
                    self.away = False
                    self.back_s.append(now_s)


@asynccontextmanager
async def counting(target: str, count: int, paces_s: tuple[float, float]) -> AsyncIterator[list[CountingStream]]:
    """So many at work, each of which has been answered, and all checked at the end."""
    stop = asyncio.Event()
    async with AsyncClient(target, connections=count) as client:
        streams = [CountingStream(client, random.uniform(*paces_s)) for _ in range(count)]
        running = asyncio.gather(*(stream.run(stop) for stream in streams))
        await until(lambda: running.done() or all(stream.steps for stream in streams))
        yield streams
        stop.set()
        await running


async def until(condition: Callable[[], bool]) -> None:
    """Return once it is true; it is asked in a thread. Raises TimeoutError."""
    async with asyncio.timeout(TIMEOUT_S):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.1)


async def kill(server: RunningServer, streams: int, kills: int) -> list[tuple[str, str]]:
    """Several times, one worker at random."""
    away_s: list[float] = []
    async with counting(server.target, streams, PACES_S["kill"]) as all_streams:
        for _ in track(range(kills), "kills"):
            for stream in all_streams:
                stream.back_s.clear()
            victim = random.choice(server.children("service.worker"))
            killed_s = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(0.5)  # so that each has found out
            await until(lambda: not any(stream.away for stream in all_streams))
            await until(lambda: metric(server.metrics_url, "rnnserve_workers") == WORKERS)
            away_s += [back_s - killed_s for stream in all_streams for back_s in stream.back_s]
        steps = sum(stream.steps for stream in all_streams)
    percentiles = [f"{np.percentile(away_s, percent):.2f}" for percent in (50, 99, 100)]
    return [
        (f"{kills} × kill -9 with {streams} streams, which cut {len(away_s)}", f"{steps:,} steps, all once"),
        ("from the kill to a stream's next answer: p50, p99, max", " s, ".join(percentiles) + " s"),
    ]


async def roll(server: RunningServer, streams: int) -> list[tuple[str, str]]:
    """Once, for all workers."""
    calm_s = 2 * max(PACES_S["roll"])
    async with counting(server.target, streams, PACES_S["roll"]) as all_streams:
        await asyncio.sleep(calm_s)
        before_s = max(stream.longest_wait_s for stream in all_streams)
        for stream in all_streams:
            stream.longest_wait_s = 0.0
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGHUP)
        await until(lambda: "all workers are new" in server.log())
        duration_s = time.monotonic() - start_s
        await asyncio.sleep(calm_s)
        waits_s = [stream.longest_wait_s for stream in all_streams]
        steps = sum(stream.steps for stream in all_streams)
        moves = sum(len(stream.back_s) for stream in all_streams)
    return [
        (f"rolling restart, {streams} streams moved {moves} times", f"{steps:,} steps, all once"),
        ("it lasted", f"{duration_s:.1f} s"),
        ("longest wait of a stream: p50, max", f"{np.median(waits_s):.2f} s, {max(waits_s):.2f} s"),
        ("the same before it, max", f"{before_s:.2f} s"),
    ]


@dataclass
class Setup:
    """Servers, how many connections lead there, and of how much of the load; and what they have used."""

    name: str
    servers: list[RunningServer]
    connections: int
    part: float = 1.0
    load: Load = field(default_factory=Load)
    cpu_s: float = 0.0

    @property
    def cpu_per_step_us(self) -> float:
        return self.cpu_s / len(self.load.latencies_s) * 1e6

    async def turn(self, streams: int, steps_per_s: float, seconds: float) -> None:
        """Load them for so long."""
        targets, count = [server.target for server in self.servers], int(streams * self.part)
        async with opened(targets, count, self.connections) as all_streams:
            before_s = self._used_s()
            await pace(all_streams, steps_per_s * self.part, seconds, self.load)
            self.cpu_s += self._used_s() - before_s

    def _used_s(self) -> float:
        return sum(cpu_s(server.process.pid) for server in self.servers)


def cpu(streams: int, steps_per_s: float, seconds: float, turns: int, connections: int) -> Table:
    """For each setup, in turns."""
    with ExitStack() as stack:
        one, left, right = (stack.enter_context(pinned_server(session_store="sqlite")) for _ in range(3))
        two = stack.enter_context(pinned_server(session_store="sqlite", workers=2))
        setups = [
            Setup("1 worker", [one], connections),
            Setup("--workers 2", [two], connections),
            Setup("2 services", [left, right], connections),
            Setup("1 worker, half of the load", [one], connections // 2, 0.5),
            Setup("1 worker", [one], 1),
            Setup("--workers 2", [two], 1),
        ]
        with on_core(CLIENT_CORE), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            for turn in track(range(turns), "turns"):
                for setup in setups if turn % 2 else reversed(setups):
                    runner.run(setup.turn(streams, steps_per_s, seconds / turns))
    title = f"CPU of all processes of a service: {streams} streams, {steps_per_s:,.0f} steps/s"
    table = Table("service", "connections", "steps", "CPU per step", "÷ 1 worker", "p99", title=title)
    for setup in setups:
        base = next(other for other in setups if other.connections == setup.connections or setup.part < 1)
        table.add_row(
            setup.name, str(setup.connections), f"{len(setup.load.latencies_s):,}", f"{setup.cpu_per_step_us:.0f} µs",
            f"{setup.cpu_per_step_us / base.cpu_per_step_us:.2f}", f"{setup.load.percentile_ms(99):.1f} ms",
        )  # fmt: skip
    return table


def survive(parts: Sequence[str], kills: int) -> Table:
    """Kill and roll."""
    table = Table("what", f"{WORKERS} workers, SQLite")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            repository, state_dir = Path(folder, "repository"), Path(folder, "state")
            write_accumulator(repository)
            state_dir.mkdir()
            with start_server(repository, state_dir, workers=WORKERS, session_store="sqlite") as server:
                rows = runner.run(kill(server, 60, kills) if part == "kill" else roll(server, 200))
        for row in rows:
            table.add_row(*row)
    return table


def main() -> int:
    """Exit code 1 with a traceback if a step was lost or repeated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("kill", "roll", "cpu")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--streams", type=int, default=128, help="for cpu")
    parser.add_argument("--steps-per-s", type=float, default=1_500, help="for cpu: of all streams together")
    parser.add_argument("--connections", type=int, default=16, help="for cpu")
    parser.add_argument("--seconds", type=float, default=40, help="for cpu: for each row, in all")
    parser.add_argument("--turns", type=int, default=4, help="for cpu: the rows take turns, so that noise hits all")
    given = parser.parse_args()
    surviving = [part for part in given.parts if part != "cpu"]
    if surviving:
        Console().print(survive(surviving, given.kills))
    if "cpu" in given.parts:
        Console().print(cpu(given.streams, given.steps_per_s, given.seconds, given.turns, given.connections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
