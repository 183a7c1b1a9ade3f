"""`python -m benchmarks.observing`: what it costs to be seen.

One server under one load counts nothing, has its metrics, and has them and sends spans of 1 % of the steps to a
collector of OpenTelemetry, a second each, round after round. A ratio is that of the steps per second in a round,
the median over the rounds, with an interval; where a client is the bottleneck, that of the processor time says more.

    python -m benchmarks.observing --into docs/operations
"""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console
from rich.progress import track

from benchmarks.network import weights_file, write_network
from benchmarks.processes import cpu_s, pinned_server
from benchmarks.report import machine, markdown
from benchmarks.switched import FILE_VARIABLE, KINDS, METRICS, NOTHING, SPANS, TURN_S, Usage
from benchmarks.turns import Row, Server, client, ratio, ratio_interval, turn
from tests.support.collector import Collector, start_collector
from tests.support.server import RunningServer

SAMPLED = 0.01
EXPORT_EVERY_MS = 250  # so that nearly all spans of a turn are sent in it
BEGINNING = 2  # rounds in which clients begin
PAGES = 50


class Load(NamedTuple):
    """What came of one: a row for the client, one for each kind of turn, and the seconds that a page takes."""

    clients: Row
    kinds: dict[str, Row]
    page_s: float


@contextmanager
def switched_server(repository: Path, turns_file: Path) -> Iterator[RunningServer]:
    """Takes turns from its start on."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(FILE_VARIABLE, str(turns_file))
        started = pinned_server(
            repository, session_store="memory", module="benchmarks.switched", trace_sample_ratio=SAMPLED
        )
        with started as server:
            yield server


def measure(streams: int, ahead: int, seconds: float) -> Load:
    """One load for so long."""
    clients = Row("switched", streams, ahead=ahead)
    with tempfile.TemporaryDirectory() as folder:
        write_network(Path(folder))
        weights = weights_file(Path(folder))
        turns_file = Path(folder) / "turns.jsonl"
        with switched_server(Path(folder), turns_file) as server:
            turn(Server(server.target, server.process.pid, weights=weights), clients, seconds)
            page_s = cpu_of_page_s(server)
        rounds = [json.loads(line) for line in turns_file.read_text().splitlines()]
    busy = [told for told in rounds if all(Usage(*told[kind]).steps for kind in KINDS)][BEGINNING:-1]
    kinds = {kind: Row(kind, streams, ahead=ahead) for kind in KINDS}
    for told in busy:
        for kind, row in kinds.items():
            used = Usage(*told[kind])
            cost_us = used.cpu_s / used.steps * 1e6
            row.turns.append({"steps_per_s": used.steps / used.wall_s, "server_cpu_us_per_step": cost_us})
    return Load(clients, kinds, page_s)


def cpu_of_page_s(server: RunningServer) -> float:
    """Of the server, to write a page of metrics."""
    before_s = cpu_s(server.process.pid)
    for _ in range(PAGES):
        with urllib.request.urlopen(server.metrics_url) as page:
            page.read()
    return (cpu_s(server.process.pid) - before_s) / PAGES


def report(seconds: float, loads: Sequence[Load], spans: int) -> str:
    """The page."""
    before = {NOTHING: NOTHING, METRICS: NOTHING, SPANS: METRICS}
    head = ["sessions", "rounds", "server", "steps/s", "÷ the line above", "CPU µs/step", "÷", "client"]
    cost, lines = "server_cpu_us_per_step", []
    for load in loads:
        row = load.clients
        sessions = f"{row.streams:,}, multiplexed" if row.ahead else f"{row.streams:,} streams"
        for kind, own in load.kinds.items():
            under = load.kinds[before[kind]]
            figures = [f"{own.median('steps_per_s'):,.0f}", _to(own, under)]
            figures += [f"{own.median(cost):.1f}", _to(own, under, cost)]
            lines.append([sessions, str(len(own.turns)), kind, *figures, client(row)])
    page_ms = 1_000 * max(load.page_s for load in loads)
    return f"""\
# What it costs to be seen

`python -m benchmarks.observing --seconds {seconds:g}` on {machine()}: the load of
[results.md](../benchmarks/results.md) on one server, which counts nothing, has its metrics, and has them and sends
spans of 1 % of the steps to a collector by turns of {TURN_S:g} s. The collector received {spans:,} spans. Figures are
medians over the rounds; ratios, to the line above, are medians of the ratios within a round, with the interval of
drawing the rounds anew (95 %). A page of metrics, every 5 s as docker-compose has it, takes {page_ms:.1f} ms of a core.

{markdown(head, lines)}
"""


def _to(row: Row, under: Row, name: str = "steps_per_s") -> str:
    if row is under:
        return "1"
    low, high = ratio_interval(row, under, name)
    return f"{ratio(row, under, name):.3f} ({low:.3f}–{high:.3f})"


def measure_all(given: argparse.Namespace, collector: Collector) -> list[Load]:
    """Of all loads. Raises RuntimeError if no span comes of it."""
    asked = [*((n, 0) for n in given.streams), *((n, 2) for n in given.multiplexed)]
    loads = [measure(*load, given.seconds) for load in track(asked, "loads", console=Console(stderr=True))]
    if not collector.spans:
        raise RuntimeError("no span was received")
    return loads


def main() -> None:
    """Measure, print the page, and write it if a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--multiplexed", type=int, nargs="*", default=[256])
    parser.add_argument("--seconds", type=float, default=150.0, help="of each load")
    parser.add_argument("--into", type=Path, help="folder of the page")
    given = parser.parse_args()
    with start_collector(OTEL_BSP_SCHEDULE_DELAY=str(EXPORT_EVERY_MS)) as collector:
        page = report(given.seconds, measure_all(given, collector), len(collector.spans))
    print(page)
    if given.into:
        given.into.mkdir(parents=True, exist_ok=True)
        (given.into / "observing.md").write_text(page)


if __name__ == "__main__":
    main()
