"""Live streams against the server and, turn by turn, against an echo server over the same transport.

    python -m benchmarks.streams --streams 256 --seconds 60
    python -m benchmarks.streams --streams 64 --stores memory sqlite redis

Closed loop: each stream sends its next step when it has the answer to the last, which it acknowledges. Servers run on
one core, this client on another. The echo server says what the transport alone allows; ours write their sessions each
second into what they are named after: nothing, SQLite, or a Redis of their own, on their core, that syncs each write to
the disk. The ratios are the figures, for machines differ.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.live import LiveStream, Load, opened
from benchmarks.processes import CLIENT_CORE, SERVER_CORE, module_server, on_core, pinned_server
from tests.support.redis_server import start_redis


@contextmanager
def all_servers(stores: Sequence[str]) -> Iterator[dict[str, str]]:
    """Start echo and one of ours for each store: name -> target."""
    with ExitStack() as stack:
        targets = {"echo": stack.enter_context(module_server("benchmarks.echo_server"))[0]}
        for store in stores:
            settings: dict[str, Any] = {"session_store": store}
            if store == "redis":
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                with on_core(SERVER_CORE):
                    settings["redis_url"] = stack.enter_context(start_redis(folder)).url
            targets[store] = stack.enter_context(pinned_server(**settings)).target
        yield targets


async def one_stream(stream: LiveStream, until_s: float, load: Load) -> None:
    """Step until the time is up. Raises RuntimeError if it is not answered."""
    step = 0
    while (start_s := time.perf_counter()) < until_s:
        await stream.send(step)
        await stream.answer()
        load.latencies_s.append(time.perf_counter() - start_s)
        step += 1


async def turn(target: str, streams: int, seconds: float, load: Load, connections: int = 1) -> None:
    """Load one server for so long."""
    async with opened([target], streams, connections) as all_streams:
        start_s = time.perf_counter()
        results = await asyncio.gather(
            *(one_stream(stream, start_s + seconds, load) for stream in all_streams), return_exceptions=True
        )
        load.errors += sum(isinstance(result, BaseException) for result in results)
        load.duration_s += time.perf_counter() - start_s


def report(loads: dict[str, Load], streams: int) -> None:
    """Print the table."""
    table = Table(title=f"{streams} streams, closed loop")
    for column in ("server", "steps", "errors", "steps/s", "÷ echo", "÷ memory", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for name, load in loads.items():
        of_echo, of_memory = (
            f"{load.steps_per_s / loads[other].steps_per_s:.2f}" if other in loads else ""
            for other in ("echo", "memory")
        )
        table.add_row(
            name, f"{len(load.latencies_s):,}", str(load.errors), f"{load.steps_per_s:,.0f}",
            of_echo, of_memory,
            f"{load.percentile_ms(50):.1f}", f"{load.percentile_ms(99):.1f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Exit code 1 if a stream failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60, help="for each server, in all")
    parser.add_argument("--turns", type=int, default=6, help="the servers take turns, so that noise hits all")
    stores = ("memory", "sqlite", "redis")
    parser.add_argument("--stores", nargs="+", choices=stores, default=stores[:2], metavar="STORE", help=str(stores))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CORE})
    with all_servers(arguments.stores) as targets, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loads = {name: Load() for name in targets}
        for _ in track(range(arguments.turns), "turns"):
            for name, target in targets.items():
                seconds = arguments.seconds / arguments.turns
                runner.run(turn(target, arguments.streams, seconds, loads[name]))
    report(loads, arguments.streams)
    return 1 if any(load.errors for load in loads.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
