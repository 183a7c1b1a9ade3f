"""How many steps a tick of whole sequences should take, by measurement: the engine alone, on one core.

Closed loop: so many sequences under way, sequences/s. Open loop: they come as a Poisson process, at four fifths of what
64 under way with ticks as the service has them reached; latency counts from the moment that one was due. All kinds of
ticks in turns; medians.

    python -m benchmarks.ticks --turns 3 --seconds 2 --into docs/benchmarks
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.network import FEATURES, MODEL
from benchmarks.plots import draw_ticks
from benchmarks.processes import SERVER_CORE, on_core
from benchmarks.report import machine, markdown
from benchmarks.sequence_load import LENGTHS, Lengths
from benchmarks.sequences import write_network
from models.bundle import load_bundle
from service.engine.sequence_engine import SequenceEngine
from service.engine.sequence_network import SequenceNetwork
from service.engine.sequence_worker import MAX_TICK_STEPS

Figures = dict[str, list[float]]


STEPS = {**{str(steps): steps for steps in (1, 4, 8, 16, 32, 64, 128, 256)}, "to the end": sys.maxsize}
SERVED = str(MAX_TICK_STEPS)
MAX_MEMBERS, UNDER_WAY, WARM_UP_S, SHARE = 64, (1, 4, 16, 64), 0.3, 0.8


class Load:
    """Random sequences through an engine."""

    def __init__(self, network: SequenceNetwork, steps: int, lengths: Lengths, seed: int) -> None:
        self.engine = SequenceEngine(MAX_MEMBERS, steps)
        self.due_s: list[float] = []
        self._network = network
        self._lengths = lengths
        self.rng = np.random.default_rng(seed)

    def add(self, due_s: float) -> None:
        values = self.rng.normal(size=(self._lengths(self.rng), FEATURES)).astype(np.float32)
        self.engine.add(len(self.due_s), self._network, values)
        self.due_s.append(due_s)

    def closed(self, under_way: int, seconds: float) -> float:
        """Sequences/s with so many of them at any time."""
        for _ in range(under_way):
            self.add(0.0)
        start_s, ended = time.perf_counter() + WARM_UP_S, 0
        while (now_s := time.perf_counter()) < start_s + seconds:
            for _ in self.engine.tick().ended:
                ended += now_s >= start_s
                self.add(0.0)
        return ended / seconds

    def opened(self, per_s: float, seconds: float) -> list[float]:
        """The latencies in seconds of sequences that come at this rate."""
        latencies_s: list[float] = []
        due_s = time.perf_counter()
        end_s = due_s + seconds
        while self.engine or due_s < end_s:
            while due_s < min(time.perf_counter(), end_s):
                self.add(due_s)
                due_s += float(self.rng.exponential(1 / per_s))
            if self.engine:
                ended = self.engine.tick().ended
                latencies_s += [time.perf_counter() - self.due_s[end.number] for end in ended]
        return latencies_s


def measure(network: SequenceNetwork, turns: int, seconds: float) -> tuple[Figures, Figures]:
    """For each kind of ticks in turn: sequences/s, by how many are under way, and p90 in ms, by the lengths."""
    closed = {(name, n): list[float]() for name in STEPS for n in UNDER_WAY}
    opened = {(name, kind): list[float]() for name in STEPS for kind in LENGTHS}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("ticks", total=turns * (len(closed) + len(opened) + len(LENGTHS)))
        for turn in range(turns):
            for (name, n), values in closed.items():
                values.append(Load(network, STEPS[name], LENGTHS["uniform"], turn).closed(n, seconds))
                progress.advance(task)
            for kind, lengths in LENGTHS.items():
                rate = SHARE * Load(network, STEPS[SERVED], lengths, turn).closed(UNDER_WAY[-1], seconds)
                progress.advance(task)
                for name, steps in STEPS.items():
                    latencies_s = Load(network, steps, lengths, turn).opened(rate, seconds)
                    opened[name, kind].append(float(np.percentile(latencies_s, 90)) * 1e3)
                    progress.advance(task)
    return (
        {f"{n} under way": [median(closed[name, n]) for name in STEPS] for n in UNDER_WAY},
        {kind: [median(opened[name, kind]) for name in STEPS] for kind in LENGTHS},
    )


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ticks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn of one kind of ticks at one load")
    parser.add_argument("--into", type=Path, help="write ticks.md and ticks.svg there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, on_core(SERVER_CORE):
        write_network(Path(folder))
        bundle = load_bundle(Path(folder) / MODEL / "1")
        per_s, p90_ms = measure(SequenceNetwork(bundle.predictor, bundle.manifest.key), given.turns, given.seconds)
    head = ["steps of a tick", *(f"sequences/s, {load}" for load in per_s), *(f"p90 ms, {kind}" for kind in p90_ms)]
    columns = zip(STEPS, *per_s.values(), *p90_ms.values(), strict=True)
    table = markdown(head, [[name, *(f"{value:,.0f}" for value in values)] for name, *values in columns])
    print(table)
    if given.into:
        given.into.mkdir(parents=True, exist_ok=True)
        draw_ticks(given.into / "ticks.svg", list(STEPS), per_s, p90_ms, f"p90, ms, at {SHARE:.0%} of the capacity")
        command = f"python -m benchmarks.ticks --turns {given.turns} --seconds {given.seconds:g}"
        parts = [f"`{command}` on {machine()}: medians over the turns.", table, "![](ticks.svg)"]
        (given.into / "ticks.md").write_text("# How many steps a tick should take\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
