"""Turns of clients against servers, and the figures that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.load import WARM_UP_S, Streamed
from benchmarks.network import FEATURES, MODEL
from benchmarks.processes import SERVER_CORE, on_core

CLIENT_CORES = sorted(os.sched_getaffinity(0) - {SERVER_CORE})
BOTTLENECK = 0.9  # of a core, by one client
CLIENTS = (
    "Where one client is busy for more than 90 % of the first turn, all turns have two, if there is a core for the "
    "second one; not where all sessions are on one stream, which cannot be shared."
)
"""Said in reports."""
PERCENTILES = (50, 90, 99, 99.9)
START_UP_S = 2.0
"""Of client processes that are to measure at the same time."""
DRAWS = 10_000
"""Of an interval."""
MAX_EXTRA_S = 60.0
"""What a client may take besides its measurement."""


@dataclass(frozen=True)
class Server:
    """A process that serves streams."""

    target: str
    pid: int
    protocol: str = "rnnserve"
    weights: Path | None = None
    """Of the network that it is to step; without, what it answers is not checked."""


@dataclass
class Row:
    """What one server did at one load: a turn's figures behind each name, in the order of the turns."""

    server: str
    streams: int
    offered_steps_per_s: float = 0.0
    ahead: int = 0  # of multiplexed sessions: steps before their answers
    clients: int = 1  # processes
    turns: list[dict[str, float]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Of its line in a plot."""
        return f"{self.server}, multiplexed, {self.ahead} ahead" if self.ahead else self.server

    def median(self, name: str) -> float:
        return median(turn[name] for turn in self.turns)

    def text(self, name: str, form: str = ",.0f") -> str:
        """The median, the least and the most."""
        values = [turn[name] for turn in self.turns]
        return f"{median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def turn(server: Server, row: Row, seconds: float) -> None:
    """Clients against a server for so long; adds its figures to the row.

    One process, or two in all turns if its core is the bottleneck in the first one and there is another; multiplexed
    sessions have one stream, which cannot be shared. Raises RuntimeError with what a client said that failed.
    """
    figures = figures_of(_load(server, row, seconds))
    most_clients = 1 if row.ahead or row.turns else min(2, len(CLIENT_CORES), row.streams)
    if figures["client_core"] > BOTTLENECK and row.clients < most_clients:
        row.clients += 1
        figures = figures_of(_load(server, row, seconds))
    row.turns.append(figures)


def _load(server: Server, row: Row, seconds: float) -> list[Streamed]:
    """What came of each client process."""
    command = [sys.executable, "-m", "benchmarks.load", "--target", server.target, "--server-pid", str(server.pid)]
    command += ["--protocol", server.protocol, "--model", MODEL, "--features", str(FEATURES)]
    command += ["--seconds", str(seconds)]
    if server.weights and not row.turns:  # once is enough, and takes a second
        command += ["--weights", str(server.weights)]
    if row.ahead:
        command += ["--multiplexed", "--ahead", str(row.ahead)]
    if row.clients > 1:
        command += ["--measure-at-s", str(time.perf_counter() + START_UP_S + WARM_UP_S)]
    with ExitStack() as stack:
        processes = []
        for number in range(row.clients):
            streams = len(range(number, row.streams, row.clients))
            own = ["--streams", str(streams), "--steps-per-s", str(row.offered_steps_per_s * streams / row.streams)]
            with on_core(CLIENT_CORES[number]):
                process = subprocess.Popen([*command, *own], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            processes.append(stack.enter_context(process))
        try:
            outcomes = [process.communicate(timeout=seconds + MAX_EXTRA_S) for process in processes]
        except subprocess.TimeoutExpired:
            for process in processes:
                process.kill()
            raise RuntimeError(f"no end after {seconds + MAX_EXTRA_S:g} s") from None
    for process, (_, said) in zip(processes, outcomes, strict=True):
        if process.returncode:
            raise RuntimeError(last_line(said))
    return [Streamed(**json.loads(printed)) for printed, _ in outcomes]


def last_line(said: str) -> str:
    """Of what a process has said: mostly why it failed."""
    lines = said.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def figures_of(clients: Iterable[Streamed]) -> dict[str, float]:
    """Throughput, latency, cost, fairness, of client processes that measured at the same time."""
    all_of = list(clients)
    latencies_ms = np.concatenate([streamed.latencies_s for streamed in all_of]) * 1e3
    steps_of_streams = [steps for streamed in all_of for steps in streamed.steps_of_streams]
    steps_per_s = sum(streamed.steps_per_s for streamed in all_of)
    server_cores = median(streamed.server_cpu_s / streamed.duration_s for streamed in all_of)
    return {
        "steps_per_s": steps_per_s,
        **{f"p{p:g}_ms": float(np.percentile(latencies_ms, p)) for p in PERCENTILES},
        "server_cpu_us_per_step": server_cores / steps_per_s * 1e6,
        "client_core": max(streamed.client_cpu_s / streamed.duration_s for streamed in all_of),
        "fairness": min(steps_of_streams) / max(steps_of_streams),
    }


def ratio(over: Row, under: Row, name: str = "steps_per_s") -> float:
    """The median of the turns' ratios."""
    return median(_ratios(over, under, name))


def ratio_interval(over: Row, under: Row, name: str = "steps_per_s") -> tuple[float, float]:
    """Where 95 % of the medians are of turns drawn anew from those that were, with replacement.

    The percentile bootstrap: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    ratios = _ratios(over, under, name)
    drawn = np.random.default_rng(0).choice(ratios, (DRAWS, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def _ratios(over: Row, under: Row, name: str) -> list[float]:
    return [a[name] / b[name] for a, b in zip(over.turns, under.turns, strict=True)]


def client(row: Row) -> str:
    """How busy the core of the busiest was."""
    processes = f"{row.clients} × " if row.clients > 1 else ""
    return processes + busy(row.median("client_core"))


def busy(core: float) -> str:
    """Such a share of a client's core, and whether it is the bottleneck."""
    return f"{core:.0%}" + (" bottleneck" if core > BOTTLENECK else "")
