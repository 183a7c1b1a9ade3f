"""What a step costs without gRPC: streams of one process whose messages come and go as bytes, and where the time goes.

python -m benchmarks.in_process --streams 64 --profile 30
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
import uvloop

from benchmarks.network import FEATURES, MODEL, write_network
from rnnserve.v1.real_time_service_pb2 import OpenSession, Steps, StreamStepsRequest, StreamStepsResponse
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor
from service.api.calls import CallInterceptor, Refusals
from service.app import Service
from service.catalog.catalog import load_catalog
from service.settings import Settings

METHOD = "/rnnserve.v1.RealTimeService/StreamSteps"
WARM_UP_S = 0.5


class Call:
    """In the place of gRPC's context: a client that sends its next step when it has the answer to the last."""

    def __init__(self, number: int) -> None:
        self._values = np.random.default_rng(number).normal(size=(1, FEATURES)).astype(np.float32).tobytes()
        self._next: asyncio.Queue[bytes] = asyncio.Queue()
        opening = StreamStepsRequest(open=OpenSession(model=MODEL, session_id=str(number)))
        self._next.put_nowait(opening.SerializeToString())
        self.steps = 0

    async def read(self) -> bytes:
        return await self._next.get()

    async def write(self, response: StreamStepsResponse) -> None:
        if response.HasField("error"):
            raise RuntimeError(response.error.message)
        response.SerializeToString()
        tensor = Tensor(data_type=DATA_TYPE_FLOAT32, shape=(1, FEATURES), data=self._values)
        request = StreamStepsRequest(answered_step=self.steps, steps=Steps(first_step=self.steps, tensor=tensor))
        self._next.put_nowait(request.SerializeToString())
        self.steps += 1

    async def send_initial_metadata(self, metadata: object) -> None:
        pass


async def measure(streams: int, seconds: float, lines: int) -> None:
    """Print microseconds per step, and the functions that took most of them."""
    with tempfile.TemporaryDirectory() as folder:
        write_network(Path(folder))
        settings = Settings(model_repository=Path(folder), state_dir=Path(folder) / "state", session_store="memory")
        service = Service(settings, load_catalog(settings.model_repository))
    calls = [Call(number) for number in range(streams)]
    handler = await _handler(service)
    tasks = [asyncio.create_task(handler(None, call)) for call in calls]
    await asyncio.sleep(WARM_UP_S)
    before, start_s = sum(call.steps for call in calls), time.perf_counter()
    profile = cProfile.Profile()
    if lines:
        profile.enable()
    await asyncio.sleep(seconds)
    profile.disable()
    steps = sum(call.steps for call in calls) - before
    print(f"{streams} streams: {(time.perf_counter() - start_s) / steps * 1e6:.1f} µs per step, this client's included")
    if lines:
        pstats.Stats(profile).sort_stats("tottime").print_stats(lines)
    for task in tasks:
        task.cancel()


async def _handler(service: Service) -> Any:
    """As the server calls it, interceptor included."""

    class Details(grpc.HandlerCallDetails):
        method = METHOD
        invocation_metadata = ()

    plain = grpc.stream_stream_rpc_method_handler(
        service.real_time.StreamSteps, StreamStepsRequest.FromString, StreamStepsResponse.SerializeToString
    )

    async def found(_: object) -> Any:
        return plain

    interceptor = CallInterceptor(service.metrics, Refusals(service.metrics), service.drain)
    handler: Any = await interceptor.intercept_service(found, Details())
    return handler.stream_stream


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--profile", type=int, default=0, metavar="LINES", help="of the functions that took most")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(given.streams, given.seconds, given.profile))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
