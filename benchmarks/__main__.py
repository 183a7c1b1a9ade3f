"""`make bench`: live streams against four things, side by side, in turns, so that noise hits all alike.

- echo: a server over the same transport that computes nothing: what gRPC in Python allows;
- by hand: the server that an engineer writes: a queue of 2 ms, states stacked, one `nn.LSTM` call;
- rnnserve: this one;
- bare step: the network alone, in a loop.

Servers run on one core, clients on the others. A client that is at work for more than 90 % of the time is the
bottleneck: if it is in its first turn, there are two, each on a core of its own; on a machine of two cores, or where
all sessions are on one stream, the table says so, and what the server could do is at least what is shown. All figures
are medians over the turns, with the least and the most; ratios are medians of the ratios within a turn.

    python -m benchmarks --quick
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.network import weights_file, write_network
from benchmarks.plots import plot
from benchmarks.processes import SERVER_CORE, module_server, on_core, pinned_server
from benchmarks.report import machine, markdown
from benchmarks.turns import CLIENTS, PERCENTILES, Row, Server, client, ratio, turn

OURS, ECHO, BY_HAND = "rnnserve", "echo", "by hand"


@contextmanager
def all_servers(repository: Path) -> Iterator[dict[str, Server]]:
    """By name."""
    weights = weights_file(repository)
    with ExitStack() as stack:
        echo = Server(*stack.enter_context(module_server("benchmarks.echo_server")))
        by_hand = Server(*stack.enter_context(module_server("benchmarks.by_hand", weights)), weights=weights)
        ours = stack.enter_context(pinned_server(repository, session_store="memory"))
        yield {ECHO: echo, BY_HAND: by_hand, OURS: Server(ours.target, ours.process.pid, weights=weights)}


def bare_step(repository: Path, batch: int, seconds: float) -> float:
    """Steps per second on the servers' core."""
    command = [sys.executable, "-m", "benchmarks.bare_step", str(repository), str(batch), str(seconds)]
    with on_core(SERVER_CORE):
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(given: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows of the closed loop, of multiplexed sessions, of the bare step and of the open loop."""
    closed = {(name, n): Row(name, n) for n in given.streams for name in (ECHO, BY_HAND, OURS)}
    multiplexed = [Row(name, n, ahead=k) for n in given.multiplexed for name, k in ((ECHO, 1), (OURS, 1), (OURS, 2))]
    bare = {n: Row("bare step", n) for n in {*given.streams, *given.multiplexed}}
    opened: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        repository = Path(folder)
        write_network(repository)
        servers = stack.enter_context(all_servers(repository))
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        rows = [*closed.values(), *multiplexed, *bare.values()]
        rows.sort(key=lambda row: row.streams)  # so that what is compared is measured side by side
        task = progress.add_task("closed loop", total=given.turns * len(rows))
        for _ in range(given.turns):
            for row in rows:
                if row.server in servers:
                    turn(servers[row.server], row, given.seconds)
                else:
                    row.turns.append({"steps_per_s": bare_step(repository, row.streams, min(1.0, given.seconds))})
                progress.advance(task)
        n = given.open_streams
        capacity = closed[OURS, n].median("steps_per_s") if (OURS, n) in closed else 0.0
        opened = [Row(name, n, share * capacity) for share in given.offered for name in servers if capacity]
        task = progress.add_task("open loop", total=given.turns * len(opened))
        for _ in range(given.turns):
            for row in opened:
                turn(servers[row.server], row, given.seconds)
                progress.advance(task)
    return {"closed": list(closed.values()), "multiplexed": multiplexed, "bare": list(bare.values()), "open": opened}


def closed_table(rows: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    """Its head and its lines."""
    head = [
        "server",
        "streams",
        "steps/s",
        "÷ echo",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
        "CPU µs/step",
        "fairness",
        "client",
    ]
    by_name = {(row.server, row.streams): row for row in rows["closed"]}
    bare = {row.streams: row for row in rows["bare"]}
    lines = []
    for row in rows["closed"]:
        lines.append(
            [
                row.server, f"{row.streams:,}", row.text("steps_per_s"),
                f"{ratio(row, by_name[ECHO, row.streams]):.2f}",
                f"{row.median('p50_ms'):.2f}", f"{row.median('p99_ms'):.2f}", f"{row.median('p99.9_ms'):.1f}",
                f"{row.median('server_cpu_us_per_step'):.0f}", f"{row.median('fairness'):.2f}",
                client(row),
            ]
        )  # fmt: skip
        if row.server == OURS:
            lines.append(["bare step", f"{row.streams:,}", bare[row.streams].text("steps_per_s"), *[""] * 7])
    return head, lines


def multiplexed_table(rows: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    """Its head and its lines."""
    head = ["server", "sessions", "ahead", "steps/s", "÷ bare step", "p50 ms", "p99 ms", "CPU µs/step", "client"]
    bare = {row.streams: row for row in rows["bare"]}
    lines = [
        [
            row.server, f"{row.streams:,}", str(row.ahead), row.text("steps_per_s"),
            f"{ratio(row, bare[row.streams]):.2f}", f"{row.median('p50_ms'):.2f}", f"{row.median('p99_ms'):.2f}",
            f"{row.median('server_cpu_us_per_step'):.1f}", client(row),
        ]
        for row in rows["multiplexed"]
    ]  # fmt: skip
    return head, lines


def open_table(rows: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]]:
    """Its head and its lines."""
    head = ["server", "streams", "offered steps/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "client"]
    lines = [
        [
            row.server, str(row.streams), f"{row.offered_steps_per_s:,.0f}",
            *(f"{row.median(f'p{p:g}_ms'):.2f}" for p in PERCENTILES), f"{row.median('client_core'):.0%}",
        ]
        for row in rows["open"]
    ]  # fmt: skip
    return head, lines


def write(folder: Path, rows: dict[str, list[Row]], command: str) -> None:
    """results.json, results.md and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "command": command,
        "machine": machine(),
        **{kind: [vars(row) for row in of_kind] for kind, of_kind in rows.items()},
    }
    (folder / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    parts = [
        "# What `make bench` has measured", f"`{command}` on {machine()}.",
        f"LSTM of 32 features and 256 units, random weights, sessions in memory; servers on one core, the client "
        f"on another. {CLIENTS}",
        "## Closed loop: steps/s, medians over the turns (least–most)", markdown(*closed_table(rows)),
        "![](closed.svg)", "## Multiplexed: the same on one stream, with messages of all sessions",
        markdown(*multiplexed_table(rows)), "## Open loop: latency from the moment that a step was due",
        markdown(*open_table(rows)), "![](open.svg)",
    ]  # fmt: skip
    (folder / "results.md").write_text("\n\n".join(parts) + "\n")
    plot(folder, rows)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256, 1_000])
    parser.add_argument("--multiplexed", type=int, nargs="+", default=[16, 64, 256, 1_024], help="sessions")
    parser.add_argument("--open-streams", type=int, default=64, help="of the open loop; one of --streams")
    parser.add_argument(
        "--offered", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="of rnnserve's steps/s"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--quick", action="store_true", help="two minutes: 1, 64 and 256 streams, 2 turns of 1 s")
    parser.add_argument("--into", type=Path, help="write results.json, results.md and plots there")
    given = parser.parse_args()
    if given.quick:
        given.streams, given.multiplexed, given.offered = [1, 64, 256], [256], [0.5]
        given.turns, given.seconds = 2, 1.0
    rows = measure(given)
    tables = {
        "closed loop": closed_table(rows), "multiplexed": multiplexed_table(rows), "open loop": open_table(rows)
    }  # fmt: skip
    for title, (head, lines) in tables.items():
        table = Table(*head, title=title)
        for line in lines:
            table.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    if given.into:
        asked = f"--streams {' '.join(map(str, given.streams))} --turns {given.turns} --seconds {given.seconds:g}"
        write(given.into, rows, f"python -m benchmarks {asked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
