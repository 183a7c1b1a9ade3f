"""One client process of `make bench`: live streams of steps against one server; what came of them, as JSON.

Closed loop: each stream sends its next step when it has the answer to the last. `--multiplexed`: the same of sessions
on one stream, each `--ahead` steps ahead of its answers; a message brings the next step of all that an answer was
about. Open loop (`--steps-per-s`, of all streams together): the steps of a stream come as a Poisson process, whether
or not those before them are answered, and latency counts from the moment that a step was due, so that a server that
falls behind is asked no less. `--weights`: the first answers of one stream are compared with those of the network.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop

from benchmarks.live import MAX_AHEAD, Stream, multiplexed, opened
from benchmarks.processes import cpu_s

WARM_UP_S = 0.5
CHECKED_STEPS = 20


@dataclass
class Streamed:
    """What came of some streams in one turn. Times in seconds."""

    latencies_s: list[float] = field(default_factory=list)
    steps_of_streams: list[int] = field(default_factory=list)
    duration_s: float = 0.0
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0
    """Of this process alone: on a shared machine others may be on its core."""

    @property
    def steps(self) -> int:
        return sum(self.steps_of_streams)

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.duration_s

    def end(self, before: Usage, after: Usage) -> None:
        """What was used meanwhile."""
        self.duration_s = after.start_s - before.start_s
        self.server_cpu_s = after.server_s - before.server_s
        self.client_cpu_s = after.client_s - before.client_s


class Usage(NamedTuple):
    """At one moment: the clock, and what was used until then, in seconds of a core."""

    start_s: float
    server_s: float
    client_s: float


def used(server_pid: int) -> Usage:
    """Now."""
    return Usage(time.perf_counter(), cpu_s(server_pid), time.process_time())


async def closed_loop(stream: Stream, first_step: int, until_s: float, streamed: Streamed | None) -> int:
    """Step until the time is up; the index of the next step. Raises RuntimeError if a step is not answered."""
    step = first_step
    while (start_s := time.perf_counter()) < until_s:
        await stream.send(step)
        await stream.answer()
        step += 1
        if streamed is not None:
            streamed.latencies_s.append(time.perf_counter() - start_s)
    return step


async def open_loop(stream: Stream, first_step: int, due_s: Sequence[float], streamed: Streamed) -> int:
    """A step at each of these times. Raises RuntimeError if one is not answered."""

    async def send() -> None:
        for step, due in enumerate(due_s, first_step):
            if (early_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(early_s)
            await stream.send(step)

    sending = asyncio.create_task(send())
    for due in due_s:
        await stream.answer()
        streamed.latencies_s.append(time.perf_counter() - due)
    await sending
    return first_step + len(due_s)


def poisson(start_s: float, seconds: float, steps_per_s: float) -> list[float]:
    """When the steps of one stream are due."""
    due_s, now_s = [], start_s
    while (now_s := now_s + random.expovariate(steps_per_s)) < start_s + seconds:
        due_s.append(now_s)
    return due_s


async def run_multiplexed(given: argparse.Namespace) -> Streamed:
    """Open, warm up, measure. Latencies are those of messages."""
    streamed, steps = Streamed(), np.zeros(given.streams, np.int64)
    async with multiplexed(given.target, given.streams, given.model, given.features) as call:
        for ahead in range(given.ahead):
            await call.send(range(given.streams), [ahead] * given.streams, [0] * given.streams)
        warm_s = time.perf_counter() + WARM_UP_S
        usage = Usage(0.0, 0.0, 0.0)
        measured = False
        while True:
            sent_s, handles, firsts = await call.answer()
            now_s = time.perf_counter()
            if measured:
                streamed.latencies_s.append(now_s - sent_s)
                steps[handles] += 1
                if now_s > usage.start_s + given.seconds:
                    break
            elif now_s > warm_s:
                measured, usage = True, used(given.server_pid)
            await call.send(handles, [step + given.ahead for step in firsts], [step + 1 for step in firsts])
        streamed.end(usage, used(given.server_pid))
        streamed.steps_of_streams = steps.tolist()
    return streamed


async def check(stream: Stream, weights: Path) -> int:
    """Step and compare; the index of the next step. Raises ValueError if a step is not the network's."""
    from benchmarks.stacked_lstm import StackedLstm  # torch takes a second, which not every turn has to spend

    lstm, state = StackedLstm(weights), None
    for step in range(CHECKED_STEPS):
        await stream.send(step)
        answer = np.frombuffer(await stream.answer(), np.float32)
        (expected,), (state,) = lstm.step(stream.values, [state])
        if answer.shape != expected.shape or not np.allclose(answer, expected, atol=1e-5):
            raise ValueError(f"step {step} is answered with {answer}, not {expected}")
    return CHECKED_STEPS


def streams_of(given: argparse.Namespace) -> AbstractAsyncContextManager[Sequence[Stream]]:
    """As the server's protocol has them."""
    if given.protocol == "rnnserve":
        return opened([given.target], given.streams, given.connections, given.model, given.features)
    from benchmarks.peers import streams  # needs what `make bench-peers` installs

    return streams.opened(given.protocol, given.target, given.streams, given.model, given.features)


async def run(given: argparse.Namespace) -> Streamed:
    """Open, warm up, measure."""
    streamed = Streamed()
    async with streams_of(given) as streams:
        firsts = [0] * len(streams)
        if given.weights:
            firsts[0] = await check(streams[0], given.weights)
        warm_s = max(time.perf_counter() + WARM_UP_S, given.measure_at_s)
        pairs = zip(streams, firsts, strict=True)
        firsts = await asyncio.gather(*(closed_loop(stream, first, warm_s, None) for stream, first in pairs))
        usage = used(given.server_pid)
        start_s = usage.start_s
        warm = zip(streams, firsts, strict=True)
        if given.steps_per_s:
            each = given.steps_per_s / len(streams)
            work = [open_loop(s, first, poisson(start_s, given.seconds, each), streamed) for s, first in warm]
        else:
            work = [closed_loop(s, first, start_s + given.seconds, streamed) for s, first in warm]
        nexts = await asyncio.gather(*work)
        streamed.end(usage, used(given.server_pid))
        streamed.steps_of_streams = [after - first for after, first in zip(nexts, firsts, strict=True)]
    return streamed


def main() -> int:
    """Prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--server-pid", type=int, required=True)
    parser.add_argument("--protocol", default="rnnserve")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--features", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--measure-at-s", type=float, default=0.0, help="of time.perf_counter(); 0 = once warm")
    parser.add_argument("--steps-per-s", type=float, default=0.0, help="0 = closed loop")
    parser.add_argument("--multiplexed", action="store_true")
    parser.add_argument("--ahead", type=int, default=1, choices=range(1, MAX_AHEAD + 1))
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        json.dump(asdict(runner.run(run_multiplexed(given) if given.multiplexed else run(given))), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
