"""Live streams in open loop: a step is sent when it is due, whether or not those before it are answered.

So a server that falls behind is asked no less, and its latency counts from the moment a step was due.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from benchmarks.live import LiveStream, Load

LEAD_S = 0.1


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
