"""Live streams against the server and, turn by turn, against an echo server over the same transport.

    python -m benchmarks.streams --streams 256 --seconds 60

Closed loop: each stream sends its next step when it has the answer to the last, which it acknowledges. Servers run on
one core, this client on another. The echo server says what the transport alone allows; one of ours keeps its sessions
in memory, the other writes them into SQLite each second. The ratios are the figures, for machines differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rnnserve.v1.real_time_service_pb2 import OpenSession, Steps, StreamStepsRequest, StreamStepsResponse
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

if TYPE_CHECKING:
    from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceAsyncStub

FEATURES = 12
MODEL = "speaker"
SERVER_CORE, CLIENT_CORE = 0, 1


@dataclass
class Load:
    """What one server did in all its turns."""

    latencies_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    errors: int = 0

    @property
    def steps_per_s(self) -> float:
        return len(self.latencies_s) / self.duration_s

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent)) * 1e3


@contextmanager
def server(*command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A server process pinned to its core, ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    os.sched_setaffinity(process.pid, {SERVER_CORE})
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def all_servers() -> Iterator[dict[str, str]]:
    """Start echo and two of ours: name -> target."""
    with ExitStack() as stack:
        echo = stack.enter_context(server("benchmarks.echo_server"))
        assert echo.stdout is not None
        targets = {"echo": f"127.0.0.1:{int(echo.stdout.readline())}"}
        for store in ("memory", "sqlite"):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            ours = {"PORT": "0", "METRICS_PORT": "0", "STATE_DIR": folder, "SESSION_STORE": store}
            process = stack.enter_context(server("service", **{f"RNNSERVE_{key}": ours[key] for key in ours}))
            targets[store] = f"127.0.0.1:{_port(process, folder)}"
        yield targets


def _port(process: subprocess.Popen[str], folder: str) -> int:
    file = Path(folder) / "server.json"
    while not file.exists():
        if process.poll() is not None:
            sys.exit("the server did not start: try `python -m service`")
        time.sleep(0.05)
    return int(json.loads(file.read_text())["port"])


async def one_stream(stub: RealTimeServiceAsyncStub, until_s: float, load: Load) -> None:
    """Step one session until the time is up."""
    values = np.random.default_rng().normal(size=(1, FEATURES)).astype("<f4")
    tensor = Tensor(data_type=DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
    call = stub.StreamSteps()
    opening = OpenSession(model=MODEL, session_id=uuid.uuid4().hex, resume_token=secrets.token_bytes(16))
    await call.write(StreamStepsRequest(open=opening))
    await call.read()
    step = 0
    while (start_s := time.perf_counter()) < until_s:
        await call.write(StreamStepsRequest(steps=Steps(first_step=step, tensor=tensor), answered_step=step))
        response = await call.read()
        while isinstance(response, StreamStepsResponse) and response.HasField("checkpoint"):
            response = await call.read()
        if not isinstance(response, StreamStepsResponse) or response.answer.next_step <= step:
            load.errors += 1
            break
        load.latencies_s.append(time.perf_counter() - start_s)
        step += 1
    await call.done_writing()


async def turn(target: str, streams: int, seconds: float, load: Load) -> None:
    """Load one server for so long."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = RealTimeServiceStub(channel)
        start_s = time.perf_counter()
        results = await asyncio.gather(
            *(one_stream(stub, start_s + seconds, load) for _ in range(streams)), return_exceptions=True
        )
        load.errors += sum(isinstance(result, BaseException) for result in results)
        load.duration_s += time.perf_counter() - start_s


def report(loads: dict[str, Load], streams: int) -> None:
    """Print the table."""
    table = Table(title=f"{streams} streams, closed loop")
    for column in ("server", "steps", "errors", "steps/s", "÷ echo", "÷ memory", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for name, load in loads.items():
        of_echo, of_memory = (load.steps_per_s / loads[other].steps_per_s for other in ("echo", "memory"))
        table.add_row(
            name, f"{len(load.latencies_s):,}", str(load.errors), f"{load.steps_per_s:,.0f}",
            f"{of_echo:.2f}", f"{of_memory:.2f}",
            f"{load.percentile_ms(50):.1f}", f"{load.percentile_ms(99):.1f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """Exit code 1 if a stream failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60, help="for each server, in all")
    parser.add_argument("--turns", type=int, default=6, help="the servers take turns, so that noise hits all")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {CLIENT_CORE})
    with all_servers() as targets, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loads = {name: Load() for name in targets}
        for _ in track(range(arguments.turns), "turns"):
            for name, target in targets.items():
                seconds = arguments.seconds / arguments.turns
                runner.run(turn(target, arguments.streams, seconds, loads[name]))
    report(loads, arguments.streams)
    return 1 if any(load.errors for load in loads.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
