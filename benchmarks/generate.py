"""Symbols/s of outputs that are written at once, and what they do to a live stream.

An LSTM of 256 units that reads and writes 64 symbols, random weights; the server on one core, all clients on another.
Beside each load runs one live stream of the same model, which sends its next step when it has the answer to the last:
how long it waits is to be compared with what it waits beside as many streams like itself.

    python -m benchmarks.generate
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import grpc
import numpy as np
import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.processes import CLIENT_CORE, cpu_s, on_core, pinned_server
from benchmarks.report import markdown
from models.generation import Generation
from models.manifest import TextInput
from models.recurrent import NetworkSpec
from rnnserve.v1.real_time_service_pb2 import GenerateRequest, OpenSession, Steps, StreamStepsRequest
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from tests.support.bundles import manifest, write_bundle
from tests.support.server import RunningServer

MODEL, SYMBOLS, MAX_SYMBOLS = "composer", tuple(map(chr, range(48, 112))), 100_000
AT_ONCE, TURNS, TURN_S, WARM_UP_S = (1, 16, 64), 3, 2.0, 0.5


class Load(NamedTuple):
    """So many of a kind at once."""

    kind: str
    at_once: int


class Measured(NamedTuple):
    """What came of a load in a turn."""

    per_s: float
    cpu_us: float  # of the server for each symbol or step, the live stream's included
    p50_ms: float  # of the live stream
    p99_ms: float


KINDS = ("outputs", "deterministic outputs", "streams")
LOADS = [Load(kind, at_once) for at_once in AT_ONCE for kind in KINDS]


def write_network(repository: Path) -> None:
    """Without an end, so that only the most symbols end an output."""
    spec = NetworkSpec(cell="lstm", symbols=64, embedding_size=32, hidden_size=256, outputs=64)
    generation = Generation(start=SYMBOLS[0], max_symbols=MAX_SYMBOLS)
    inputs = TextInput(symbols=SYMBOLS)
    described = manifest(MODEL, spec, inputs, labels=SYMBOLS, pattern="one-to-many", generation=generation)
    write_bundle(repository, described)


async def write(stub: Any, counted: Callable[[float], object], *, deterministic: bool) -> None:
    """One output after another; counts each symbol with how long it took."""
    while True:
        start_s = time.perf_counter()
        async for _ in stub.Generate(GenerateRequest(model=MODEL, deterministic=deterministic)):
            now_s = time.perf_counter()
            counted(now_s - start_s)
            start_s = now_s


async def stream(stub: Any, counted: Callable[[float], object], session_id: str) -> None:
    """Each step when the last one is answered; counts each with how long it took."""
    answered: asyncio.Queue[None] = asyncio.Queue()

    async def requests() -> AsyncIterator[StreamStepsRequest]:
        yield StreamStepsRequest(open=OpenSession(model=MODEL, session_id=session_id))
        for step in itertools.count():
            await answered.get()
            yield StreamStepsRequest(answered_step=step, steps=Steps(first_step=step, text=SYMBOLS[step % 64]))

    start_s = time.perf_counter()
    async for _ in stub.StreamSteps(requests()):
        now_s = time.perf_counter()
        counted(now_s - start_s)
        start_s = now_s
        answered.put_nowait(None)


async def measure(server: RunningServer, load: Load) -> Measured:
    """For TURN_S, once it has run for WARM_UP_S."""
    others_s, live_s = list[float](), list[float]()
    async with grpc.aio.insecure_channel(server.target) as channel:
        stub = RealTimeServiceStub(channel)
        work: list[Coroutine[Any, Any, None]] = [stream(stub, live_s.append, "live")]
        for number in range(load.at_once):
            if load.kind == "streams":
                work.append(stream(stub, others_s.append, f"other-{number}"))
            else:
                work.append(write(stub, others_s.append, deterministic=load.kind != "outputs"))
        tasks = [asyncio.create_task(each) for each in work]
        await asyncio.sleep(WARM_UP_S)
        others_s.clear()
        live_s.clear()
        used_s, start_s = cpu_s(server.process.pid), time.perf_counter()
        await asyncio.sleep(TURN_S)
        duration_s, used_s = time.perf_counter() - start_s, cpu_s(server.process.pid) - used_s
        done, waits_ms = len(others_s), np.array(live_s) * 1e3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    cpu_us = used_s / (done + len(waits_ms)) * 1e6
    return Measured(done / duration_s, cpu_us, *map(float, np.percentile(waits_ms, [50, 99])))


def main() -> None:
    """Medians over turns, in which one load comes after the other."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    turns: dict[Load, list[Measured]] = {load: [] for load in LOADS}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        write_network(Path(folder))
        with pinned_server(Path(folder), session_store="memory") as server, on_core(CLIENT_CORE):
            for _, load in progress.track(list(itertools.product(range(TURNS), LOADS))):
                turns[load].append(uvloop.run(measure(server, load)))
    head = ["at once", "what", "symbols or steps/s", "CPU, µs each", "a stream beside it: p50", "p99"]
    lines = []
    for load, measured in turns.items():
        per_s, cpu_us, p50_ms, p99_ms = map(median, zip(*measured, strict=True))
        lines.append(
            [str(load.at_once), load.kind, f"{per_s:,.0f}", f"{cpu_us:.0f}", f"{p50_ms:.1f} ms", f"{p99_ms:.1f} ms"]
        )
    print(markdown(head, lines))


if __name__ == "__main__":
    main()
