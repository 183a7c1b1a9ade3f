"""`make bench-peers`: live streams against what people would use instead of rnnserve, side by side, in turns.

- mosec: HTTP, its own batcher, states kept by the worker;
- Triton: gRPC streams, sequences batched by its strategy `oldest`, states kept by a model in its Python backend;
- the KServe SDK: gRPC calls, a step each, states kept by the model;
- by hand: the server that an engineer writes on gRPC, as in `make bench`.

All serve the same weights, each from a virtual environment that this command makes in build/peers, and the first
answers of each are compared with the network's own. A peer that cannot be installed, started or loaded is reported as
such. Servers run on one core, clients on another; medians over the turns, ratios are medians of a turn's ratios.

    python -m benchmarks.peers --streams 1 64 --turns 3
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.network import weights_file, write_network
from benchmarks.peers import NAMES
from benchmarks.peers.report import AHEAD, HEAD, OURS, best_peers, lines_of
from benchmarks.peers.servers import PEERS, TORCH_INDEX, Peer, installed_peers, started_peers
from benchmarks.plots import draw
from benchmarks.processes import module_server, pinned_server
from benchmarks.report import machine, markdown
from benchmarks.turns import CLIENTS, Row, Server, turn

BY_HAND = "by hand"
MULTIPLEXED = 256


@contextmanager
def all_servers(
    repository: Path, folder: Path, peers: Sequence[Peer], failed: dict[str, str]
) -> Iterator[dict[str, Server]]:
    """By name; those that do not start go into `failed`."""
    weights = weights_file(repository)
    with ExitStack() as stack:
        ours = stack.enter_context(pinned_server(repository, session_store="memory"))
        others = stack.enter_context(started_peers(peers, "steps", repository, folder, failed))
        by_hand = stack.enter_context(module_server("benchmarks.by_hand", weights))
        yield {
            OURS: Server(ours.target, ours.process.pid, weights=weights),
            **others,
            BY_HAND: Server(*by_hand, weights=weights),
        }


def measure(given: argparse.Namespace, failed: dict[str, str]) -> list[Row]:
    """A row for each server and number of streams, and one of multiplexed sessions; what fails goes into `failed`."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        repository = Path(folder) / "repository"
        write_network(repository)
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        peers = installed_peers(NAMES, given.torch_index, progress, failed)
        servers = stack.enter_context(all_servers(repository, Path(folder), peers, failed))
        rows = [Row(name, streams) for streams in given.streams for name in servers]
        rows.append(Row(OURS, MULTIPLEXED, ahead=AHEAD))
        task = progress.add_task("closed loop", total=given.turns * len(rows))
        for _ in range(given.turns):
            for row in rows:
                load = f"{row.label} with {row.streams} streams"
                if load not in failed and row.server in servers:
                    try:
                        turn(servers[row.server], row, given.seconds)
                    except RuntimeError as reason:
                        failed[load] = f"failed: {reason}"
                progress.advance(task)
    return [row for row in rows if len(row.turns) == given.turns]


def write(folder: Path, rows: list[Row], failed: dict[str, str], command: str) -> None:
    """peers.json, peers.md and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"command": command, "machine": machine(), "failed": failed, "rows": [vars(row) for row in rows]}
    (folder / "peers.json").write_text(json.dumps(data, indent=1) + "\n")
    versions = ", ".join(package for peer in PEERS for package in peer.packages)
    parts = [
        "# What `make bench-peers` has measured", f"`{command}` on {machine()}.",
        f"LSTM of 32 features and 256 units, the same random weights for all; {versions}. Sessions in memory; servers "
        f"on one core, the client on another; closed loop; medians over the turns (least–most). {CLIENTS}",
        markdown(HEAD, lines_of(rows)), "![](peers.svg)", *(f"- {line}" for line in best_peers(rows)),
        *(f"- {name} {reason}" for name, reason in failed.items()),
    ]  # fmt: skip
    (folder / "peers.md").write_text("\n\n".join(parts) + "\n")
    draw(folder / "peers.svg", rows, "streams", "steps_per_s", "steps/s")


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--torch-index", default=TORCH_INDEX)
    parser.add_argument("--into", type=Path, help="write peers.json, peers.md and a plot there")
    given = parser.parse_args()
    failed: dict[str, str] = {}
    rows = measure(given, failed)
    table = Table(*HEAD, title="closed loop")
    for line in lines_of(rows):
        table.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for said in [*best_peers(rows), *(f"{name} {reason}" for name, reason in failed.items())]:
        console.print(said)
    if given.into:
        asked = f"--streams {' '.join(map(str, given.streams))} --turns {given.turns} --seconds {given.seconds:g}"
        write(given.into, rows, failed, f"python -m benchmarks.peers {asked}")
    return int(any(name.startswith(OURS) for name in failed))


if __name__ == "__main__":
    sys.exit(main())
