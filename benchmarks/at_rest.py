"""What sessions cost that do nothing: memory, and how much slower others are beside many of them.

    python -m benchmarks.at_rest --sessions 100000 --streams 10000

Memory is what a server holds more than one without sessions, without the state's row where it has that in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.live import multiplexed, opened
from benchmarks.load import Streamed
from benchmarks.network import FEATURES, HIDDEN_SIZE, MODEL, write_network
from benchmarks.processes import CLIENT_CORE, on_core, pinned_server
from benchmarks.report import machine, markdown
from tests.support.server import RunningServer
from tests.support.wire import eventually, metric

ROW_BYTES = 2 * HIDDEN_SIZE * 4
FEW = 100  # sessions at rest beside which many are compared
HEAD = ("at rest", "measured")
WORKING = 64  # streams that step meanwhile
CONNECTIONS = 10
SETTINGS = {"max_streams": 1_000_000, "max_sessions": 1_000_000, "idle_timeout_s": 0}


@contextmanager
def empty_server(repository: Path, state_dir: Path | None = None) -> Iterator[RunningServer]:
    """Of the network of `make bench`, or with what it finds."""
    with pinned_server(repository, state_dir, **SETTINGS) as server:
        yield server


@asynccontextmanager
async def at_rest(server: RunningServer, sessions: int, *, park: bool) -> AsyncIterator[None]:
    """So many sessions: multiplexed, or parked."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(multiplexed(server.target, sessions, MODEL, FEATURES))
        if park:
            await stack.aclose()
            await asyncio.to_thread(
                eventually, lambda: metric(server.metrics_url, "rnnserve_parked_sessions") == sessions
            )
        yield


async def parked_bytes(repository: Path, state_dir: Path, sessions: int) -> float:
    """Of each of so many parked sessions: a server that finds them in its store, less one that finds none."""
    with empty_server(repository, state_dir) as server:
        async with at_rest(server, sessions, park=True):
            pass
    with empty_server(repository) as empty, empty_server(repository, state_dir) as full:
        return (memory_bytes(full) - memory_bytes(empty)) / sessions


async def multiplexed_bytes(repository: Path, sessions: int) -> float:
    """Of each of so many idle sessions on one stream."""
    with empty_server(repository) as server:
        before = memory_bytes(server)
        async with at_rest(server, sessions, park=False):
            return (memory_bytes(server) - before) / sessions - ROW_BYTES


async def stream_bytes(repository: Path, streams: int) -> float:
    """Of each of so many idle streams."""
    with empty_server(repository) as server:
        before = memory_bytes(server)
        async with opened([server.target], streams, CONNECTIONS, MODEL, FEATURES):
            return (memory_bytes(server) - before) / streams - ROW_BYTES


async def beside(repository: Path, given: argparse.Namespace, *, park: bool) -> float:
    """Steps/s of live streams beside many sessions at rest ÷ beside few: the median over the turns."""
    ratios = []
    with empty_server(repository) as crowded, empty_server(repository) as quiet:
        async with at_rest(crowded, given.sessions, park=park), at_rest(quiet, FEW, park=park):
            for _ in range(given.turns):
                few, many = [await asyncio.to_thread(steps_per_s, server, given.seconds) for server in (quiet, crowded)]
                ratios.append(many / few)
    return median(ratios)


def parked(server: RunningServer) -> float:
    """How many sessions are."""
    return metric(server.metrics_url, "rnnserve_parked_sessions")


def memory_bytes(server: RunningServer) -> float:
    """What the process has in memory now."""
    return metric(server.metrics_url, "process_resident_memory_bytes")


def steps_per_s(server: RunningServer, seconds: float) -> float:
    """Of live streams in closed loop."""
    command = [sys.executable, "-m", "benchmarks.load", "--target", server.target]
    command += ["--server-pid", str(server.process.pid), "--model", MODEL, "--features", str(FEATURES)]
    command += ["--streams", str(WORKING), "--seconds", str(seconds)]
    with on_core(CLIENT_CORE):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Streamed(**json.loads(done.stdout)).steps_per_s


async def measure(given: argparse.Namespace) -> list[tuple[str, str]]:
    """What, and how much."""
    many, streams = given.sessions, given.streams
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        repository, state_dir = Path(folder) / "repository", Path(folder) / "state"
        state_dir.mkdir()
        write_network(repository)
        others = f"steps/s of {WORKING} streams beside {many:,}"
        work: list[tuple[str, Coroutine[None, None, float]]] = [
            (f"bytes of each of {many:,} parked sessions", parked_bytes(repository, state_dir, many)),
            (f"bytes of each of {many:,} multiplexed sessions", multiplexed_bytes(repository, many)),
            (f"bytes of each of {streams:,} open streams", stream_bytes(repository, streams)),
            (f"{others} parked sessions ÷ beside {FEW}", beside(repository, given, park=True)),
            (f"{others} multiplexed sessions ÷ beside {FEW}", beside(repository, given, park=False)),
        ]
        found = []
        for what, much in progress.track(work, description="sessions at rest"):
            found.append((what, _text(await much)))
        return found


def _text(value: float) -> str:
    """Bytes without decimals, a ratio with two."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--into", type=Path, help="write at_rest.md there")
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(given))
    table = Table(*HEAD)
    for line in found:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if given.into:
        write(given, found)
    return 0


def write(given: argparse.Namespace, found: list[tuple[str, str]]) -> None:
    """at_rest.md."""
    asked = f"--sessions {given.sessions} --streams {given.streams} --turns {given.turns} --seconds {given.seconds:g}"
    parts = [
        "# What sessions cost that do nothing", f"`python -m benchmarks.at_rest {asked}` on {machine()}.",
        f"Memory besides the state's row of {ROW_BYTES:,} bytes, which parked sessions have in the store only.",
        markdown(HEAD, found),
    ]  # fmt: skip
    given.into.mkdir(parents=True, exist_ok=True)
    (given.into / "at_rest.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    sys.exit(main())
