"""Live streams in open loop: a step is sent when it is due, whether or not those before it are answered.

So a server that falls behind is asked no less, and its latency counts from the moment a step was due.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from benchmarks.live import LiveStream, Load
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub

LEAD_S = 0.1


@asynccontextmanager
async def opened(targets: Sequence[str], streams: int, connections: int) -> AsyncIterator[list[LiveStream]]:
    """So many streams, spread over so many connections, spread over the targets."""
    async with AsyncExitStack() as stack:
        stubs = []
        for number in range(connections):
            own = [("grpc.use_local_subchannel_pool", 1)]  # or channels to a target would share a connection
            channel = grpc.aio.insecure_channel(targets[number % len(targets)], options=own)
            stubs.append(RealTimeServiceStub(await stack.enter_async_context(channel)))
        opened = [LiveStream(stubs[number % connections]) for number in range(streams)]
        await asyncio.gather(*(stream.open() for stream in opened))
        yield opened
        await asyncio.gather(*(stream.close() for stream in opened))


async def pace(streams: Sequence[LiveStream], steps_per_s: float, seconds: float, load: Load) -> None:
    """Steps of all streams together, each stream at an even pace of its own phase. Once for each opened stream.

    Raises RuntimeError if one is not answered.
    """
    every_s = len(streams) / steps_per_s
    start_s = time.perf_counter() + LEAD_S
    steps = int(seconds / every_s)
    phases_s = [start_s + random.uniform(0, every_s) for _ in streams]
    await asyncio.gather(
        *(
            _step(stream, [phase_s + step * every_s for step in range(steps)], load)
            for stream, phase_s in zip(streams, phases_s, strict=True)
        )
    )
    load.duration_s += seconds


async def _step(stream: LiveStream, due_s: Sequence[float], load: Load) -> None:
    sending = asyncio.create_task(_send(stream, due_s))
    for due in due_s:
        await stream.answer()
        load.latencies_s.append(time.perf_counter() - due)
    await sending


async def _send(stream: LiveStream, due_s: Sequence[float]) -> None:
    for step, due in enumerate(due_s):
        if (early_s := due - time.perf_counter()) > 0:
            await asyncio.sleep(early_s)
        await stream.send(step)
