"""`python -m benchmarks.observing`: what it costs to be seen.

The same load on three servers in turns: one that counts nothing, one with its metrics, scraped every five seconds, and
one that also sends spans of 1 % of the steps to a collector of OpenTelemetry. A ratio is that of the steps per second,
the median over the turns, with an interval: on a machine that others use, many short turns narrow it, few long ones do
not. Where a client is the bottleneck, the ratio of the processor time says more.

    python -m benchmarks.observing --into docs/operations
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.network import weights_file, write_network
from benchmarks.processes import pinned_server
from benchmarks.report import machine, markdown
from benchmarks.turns import Row, Server, client, ratio, ratio_interval, turn
from tests.support.collector import Collector, start_collector
from tests.support.server import RunningServer

NOTHING, METRICS, SPANS = "counts nothing", "metrics", "metrics and spans of 1 %"
SAMPLED = 0.01
SCRAPE_EVERY_S = 5.0  # as docker-compose has it


@contextmanager
def scraped(server: RunningServer) -> Iterator[None]:
    """Its page of metrics is read as often as Prometheus does."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(SCRAPE_EVERY_S):
            with urllib.request.urlopen(server.metrics_url) as page:
                page.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def all_servers(repository: Path) -> Iterator[Mapping[str, Server]]:
    """By name."""
    weights = weights_file(repository)
    kinds = (
        (NOTHING, "benchmarks.unobserved", 0.0),
        (METRICS, "service", 0.0),
        (SPANS, "service", SAMPLED),
    )
    with ExitStack() as stack:
        servers = {}
        for name, module, sampled in kinds:
            started = pinned_server(repository, session_store="memory", module=module, trace_sample_ratio=sampled)
            server = stack.enter_context(started)
            if name != NOTHING:
                stack.enter_context(scraped(server))
            servers[name] = Server(server.target, server.process.pid, weights=weights)
        yield servers


def measure(given: argparse.Namespace, collector: Collector) -> list[Row]:
    """The rows of all loads; the servers take turns."""
    loads = [*((n, 0) for n in given.streams), *((n, 2) for n in given.multiplexed)]
    rows_of = [[Row(name, n, ahead=ahead) for name in (NOTHING, METRICS, SPANS)] for n, ahead in loads]
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        write_network(repository)
        with all_servers(repository) as servers:
            for number in track(range(given.turns), "turns", console=Console(stderr=True)):
                for rows in rows_of:
                    first = number % len(rows)  # each server comes as often first
                    for row in (*rows[first:], *rows[:first]):
                        turn(servers[row.server], row, given.seconds)
    if not collector.spans:
        raise RuntimeError("no span was received")
    return [row for rows in rows_of for row in rows]


def report(given: argparse.Namespace, rows: list[Row], spans: int) -> str:
    """The page."""
    before = {NOTHING: NOTHING, METRICS: NOTHING, SPANS: METRICS}
    by_name = {(row.server, row.streams, row.ahead): row for row in rows}
    head = ["sessions", "server", "steps/s", "÷ the line above", "CPU µs/step", "÷", "p99 ms", "client"]
    lines = []
    for row in rows:
        under = by_name[before[row.server], row.streams, row.ahead]
        cost = "server_cpu_us_per_step"
        sessions = f"{row.streams:,}, multiplexed" if row.ahead else f"{row.streams:,} streams"
        lines.append(
            [
                sessions, row.server, row.text("steps_per_s"), _to(row, under),
                f"{row.median(cost):.1f}", _to(row, under, cost), f"{row.median('p99_ms'):.2f}", client(row),
            ]
        )  # fmt: skip
    return f"""\
# What it costs to be seen

`python -m benchmarks.observing --turns {given.turns} --seconds {given.seconds:g}` on {machine()}: the load of
[results.md](../benchmarks/results.md) on three servers in turns. One counts nothing; one has its metrics, scraped every
{SCRAPE_EVERY_S:g} s; one also sends spans of 1 % of the steps to a collector, which received {spans:,} of them. Figures
are medians over the turns, with the least and the most; ratios, to the server in the line above, are medians
of the ratios within a turn, with the interval of drawing the turns anew (95 %).

{markdown(head, lines)}
"""


def _to(row: Row, under: Row, name: str = "steps_per_s") -> str:
    if row is under:
        return "1"
    low, high = ratio_interval(row, under, name)
    return f"{ratio(row, under, name):.3f} ({low:.3f}–{high:.3f})"


def main() -> None:
    """Measure, print the page, and write it if a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--multiplexed", type=int, nargs="*", default=[256])
    parser.add_argument("--turns", type=int, default=45)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each load in a turn")
    parser.add_argument("--into", type=Path, help="folder of the page")
    given = parser.parse_args()
    with start_collector() as collector:
        rows = measure(given, collector)
        page = report(given, rows, len(collector.spans))
    print(page)
    if given.into:
        given.into.mkdir(parents=True, exist_ok=True)
        (given.into / "observing.md").write_text(page)


if __name__ == "__main__":
    main()
