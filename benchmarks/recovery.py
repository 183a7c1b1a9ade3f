"""How long sessions are away: after a crash, over a drain, and out of a full store.

    python -m benchmarks.recovery

Streams a network that sums exactly what it hears, so that each answer proves that no step was lost or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.bundle import Bundle
from models.recurrent import NetworkSpec
from rnnserve import AsyncClient, AsyncStream, ResumePoint
from service.sessions.record import ANONYMOUS, SessionKey, SessionRecord
from service.sessions.session import hash_of
from service.sessions.stores.sqlite import SqliteStore
from tests.support.bundles import features, manifest, write_accumulator, write_bundle
from tests.support.server import free_port, start_server

TOKEN = bytes(16)
BATCH_SESSIONS = 1_000


async def step(stream: AsyncStream, value: float, total: float) -> float:
    """The sum with one more value. Raises RuntimeError if a step was lost or doubled."""
    answer = await stream.step([value])
    if answer.output[0] != total + value:
        raise RuntimeError(f"session {stream.session} has the sum {answer.output[0]}, not {total + value}")
    return total + value


@asynccontextmanager
async def open_streams(target: str, count: int) -> AsyncIterator[list[AsyncStream]]:
    """So many sessions, each with ten steps that sum up to 10."""
    async with AsyncClient(target) as client:
        streams = [client.stream("accumulator") for _ in range(count)]
        for start in range(0, count, 100):
            await asyncio.gather(*(stream.open() for stream in streams[start : start + 100]))
        for heard in range(10):
            await asyncio.gather(*(step(stream, 1.0, float(heard)) for stream in streams))
        yield streams


async def crash(repository: Path, state_dir: Path, port: int, streams: int) -> list[tuple[str, str]]:
    """kill -9 with live streams; from the moment that the next server serves to each stream's next answer."""
    with start_server(repository, state_dir, port=port) as server:
        async with open_streams(server.target, streams) as opened:
            server.kill()
            waiting = [asyncio.create_task(_next_answer(stream)) for stream in opened]
            start_s = time.monotonic()
            with ExitStack() as stack:
                await asyncio.to_thread(stack.enter_context, start_server(repository, state_dir, port=port))
                serving_s = time.monotonic()
                answered_s = await asyncio.gather(*waiting)
    return [
        (f"start-up after a kill, {streams} live streams", f"{serving_s - start_s:.2f} s"),
        ("from then to the next answer, p99", f"{np.percentile(np.array(answered_s) - serving_s, 99):.2f} s"),
    ]


async def _next_answer(stream: AsyncStream) -> float:
    await step(stream, 1.0, 10.0)
    return time.monotonic()


async def drain(repository: Path, state_dir: Path, port: int, streams: int) -> list[tuple[str, str]]:
    """SIGTERM with live streams, then go on with each of them on the next server."""
    with start_server(repository, state_dir, port=port) as server:
        async with open_streams(server.target, streams) as opened:
            start_s = time.monotonic()
            server.terminate()
            code = await asyncio.to_thread(server.process.wait, 60)
            duration_s = time.monotonic() - start_s
            with start_server(repository, state_dir, port=port):
                await asyncio.gather(*(step(stream, 1.0, 10.0) for stream in opened))
    return [(f"drain with {streams} live streams, exit code {code}, nothing lost or doubled", f"{duration_s:.2f} s")]


async def full_store(repository: Path, state_dir: Path, sessions: int) -> list[tuple[str, str]]:
    """Start over a store of parked sessions of an LSTM with 256 units, and resume some of them one by one."""
    spec = NetworkSpec(cell="lstm", features=3, hidden_size=256, outputs=2)
    bundle = write_bundle(repository, manifest("lstm", spec, features(3)))
    await _fill(state_dir / "full", bundle, sessions)
    (state_dir / "empty").mkdir()
    start_s = time.monotonic()
    with start_server(repository, state_dir / "empty"):
        empty_s = time.monotonic() - start_s
    start_s = time.monotonic()
    with start_server(repository, state_dir / "full") as server:
        full_s = time.monotonic() - start_s
        latencies_s = []
        async with AsyncClient(server.target) as client:
            for number in np.random.default_rng(0).choice(sessions, 1_000, replace=False):
                point = ResumePoint(f"s{number}", TOKEN.hex(), 5)
                stream = client.stream("lstm", resume=point)
                resume_s = time.perf_counter()
                await stream.open()
                latencies_s.append(time.perf_counter() - resume_s)
                await stream.park()
    return [
        (f"start-up over {sessions:,} parked sessions", f"{full_s:.2f} s"),
        ("the same over none", f"{empty_s:.2f} s"),
        ("resume one of them, p99", f"{np.percentile(latencies_s, 99) * 1e3:.1f} ms"),
    ]


async def _fill(state_dir: Path, bundle: Bundle, sessions: int) -> None:
    store = SqliteStore(state_dir / "sessions.sqlite")
    await store.open()
    rng, key = np.random.default_rng(0), bundle.manifest.key
    for start in track(range(0, sessions, BATCH_SESSIONS), "filling the store"):
        await store.write(
            [
                SessionRecord(
                    SessionKey(ANONYMOUS, f"s{number}"), key, bundle.manifest.weights_sha256, hash_of(TOKEN), 5, 5,
                    rng.normal(size=bundle.predictor.row_size).astype(np.float32),
                    opened_s=time.time(), used_s=time.time(),
                )
                for number in range(start, start + BATCH_SESSIONS)
            ]
        )  # fmt: skip
    await store.close()


async def measure(sessions: int) -> list[tuple[str, str]]:
    """All three, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        write_accumulator(repository)
        rows = []
        for name, part, count in (("crash", crash, 100), ("drain", drain, 1_000)):
            (Path(folder) / name).mkdir()
            rows += await part(repository, Path(folder) / name, free_port(), count)
        return rows + await full_store(repository, Path(folder), sessions)


def main() -> int:
    """Exit code 1 with a traceback if a step was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=100_000, help="parked ones in the full store")
    rows = asyncio.run(measure(parser.parse_args().sessions))
    table = Table("what", "how long")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
