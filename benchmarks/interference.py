"""What whole sequences do to live streams that are on the same core.

    python -m benchmarks.interference

First the live streams' capacity is measured, in closed loop. Then they come in open loop at half of it, alone and, turn
by turn, while Predict and PredictStream keep the lane for whole sequences at work all the time. Latency counts from the
moment a step was due. The server and its lane are on one core, all clients on another; what other programs use of the
servers' core disturbs the figures, and is shown. A percentile is the median of those of the turns, so that a hiccup of
the machine counts once; beside it is that of all turns together.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import streams as closed_loop
from benchmarks.live import FEATURES, Load, opened
from benchmarks.open_loop import pace
from benchmarks.processes import CLIENT_CORE, SERVER_CORE, core_s, cpu_s, on_core, pinned_server
from rnnserve.v1.sequence_service_pb2 import (
    IdentifiedSequence,
    OpenPredictStream,
    PredictRequest,
    PredictStreamRequest,
    Sequence,
)
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor
from tests.support.server import RunningServer

MODEL = "speaker-bidirectional"
SEQUENCE_STEPS = 200
SEQUENCES = 8  # of one Predict call
CALLS = 4  # of Predict at once
IN_FLIGHT = 32  # on one PredictStream call
CONNECTIONS = 8  # of the live streams
USERS = ("worker", "lane", "others")


@dataclass
class Turns:
    """What came of all turns of a kind."""

    loads: list[Load] = field(default_factory=list)
    sequences: int = 0
    used_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(USERS, 0.0))
    """Of the servers' core, by whom."""

    def share(self, who: str) -> str:
        """Of the core, in all turns."""
        return f"{max(0.0, self.used_s[who] / self.duration_s):.0%}"

    @property
    def steps(self) -> int:
        return sum(len(load.latencies_s) for load in self.loads)

    @property
    def duration_s(self) -> float:
        return sum(load.duration_s for load in self.loads)

    def percentile_ms(self, percent: float) -> float:
        """The median of those of the turns."""
        return float(np.median([load.percentile_ms(percent) for load in self.loads]))

    def percentile_of_all_ms(self, percent: float) -> float:
        """Of all turns together."""
        return float(np.percentile([s for load in self.loads for s in load.latencies_s], percent)) * 1e3


class Sequences:
    """Whole sequences, always more than the lane can take at once."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = SequenceServiceStub(channel)
        values = np.random.default_rng(0).normal(size=(SEQUENCE_STEPS, FEATURES)).astype("<f4")
        tensor = Tensor(data_type=DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
        self._sequence = Sequence(tensor=tensor)
        self.answered = 0

    async def predict(self) -> None:
        """One call after another."""
        request = PredictRequest(model=MODEL, sequences=[self._sequence] * SEQUENCES)
        while True:
            self.answered += len((await self._stub.Predict(request)).predictions)

    async def predict_stream(self) -> None:
        """One call, with so many sequences in flight."""
        places = asyncio.Semaphore(IN_FLIGHT)
        async for _ in self._stub.PredictStream(self._requests(places)):
            self.answered += 1
            places.release()
        raise RuntimeError("PredictStream has ended")

    async def _requests(self, places: asyncio.Semaphore) -> AsyncIterator[PredictStreamRequest]:
        yield PredictStreamRequest(open=OpenPredictStream(model=MODEL))
        for number in itertools.count():
            await places.acquire()
            yield PredictStreamRequest(sequence=IdentifiedSequence(id=number, sequence=self._sequence))


@asynccontextmanager
async def saturated(target: str, turns: Turns) -> AsyncIterator[None]:
    """The lane, within the block."""
    async with grpc.aio.insecure_channel(target) as channel:
        sequences = Sequences(channel)
        work = [asyncio.create_task(sequences.predict()) for _ in range(CALLS)]
        work.append(asyncio.create_task(sequences.predict_stream()))
        await asyncio.sleep(1.0)
        before = sequences.answered
        yield
        turns.sequences += sequences.answered - before
        for task in work:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


async def turn(server: RunningServer, streams: int, steps_per_s: float, seconds: float, turns: Turns) -> None:
    """Live streams for so long."""
    turns.loads.append(Load())
    async with opened([server.target], streams, CONNECTIONS) as all_streams:
        before_s = _used_s(server)
        await pace(all_streams, steps_per_s, seconds, turns.loads[-1])
        after_s = _used_s(server)
        for who in USERS:
            turns.used_s[who] += after_s[who] - before_s[who]


def _used_s(server: RunningServer) -> dict[str, float]:
    """Of the servers' core, so far."""
    lane_s, both_s, all_s = cpu_s(server.lane_pid()), cpu_s(server.process.pid), core_s(SERVER_CORE)
    return {"worker": both_s - lane_s, "lane": lane_s, "others": all_s - both_s}


async def rest(server: RunningServer) -> None:
    """Return once the lane has ended what is still under way of calls that were cancelled."""
    before_s = -1.0
    while (used_s := cpu_s(server.lane_pid())) > before_s:
        before_s = used_s
        await asyncio.sleep(0.5)


async def disturbed_turn(server: RunningServer, streams: int, steps_per_s: float, seconds: float, turns: Turns) -> None:
    """The same while the lane is at work."""
    async with saturated(server.target, turns):
        await turn(server, streams, steps_per_s, seconds, turns)
    await rest(server)


def report(alone: Turns, disturbed: Turns, streams: int, steps_per_s: float) -> None:
    """Print the table."""
    title = f"{streams} live streams in open loop, {steps_per_s:,.0f} steps/s: half of the capacity"
    table = Table("lane", "steps", "p50", "p99", "÷ idle", "p99 of all", "÷ idle", *USERS, "seq./s", title=title)
    for name, turns in (("idle", alone), ("busy", disturbed)):
        table.add_row(
            name, f"{turns.steps:,}", f"{turns.percentile_ms(50):.1f} ms", f"{turns.percentile_ms(99):.1f} ms",
            f"{turns.percentile_ms(99) / alone.percentile_ms(99):.2f}", f"{turns.percentile_of_all_ms(99):.1f} ms",
            f"{turns.percentile_of_all_ms(99) / alone.percentile_of_all_ms(99):.2f}",
            *map(turns.share, USERS), f"{turns.sequences / turns.duration_s:.0f}",
        )  # fmt: skip
    Console().print(table)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="alone, and as long with whole sequences")
    parser.add_argument("--turns", type=int, default=12, help="both take turns, so that noise hits both")
    given = parser.parse_args()
    alone, disturbed, capacity = Turns(), Turns(), Load()
    seconds = given.seconds / given.turns
    with (
        pinned_server(max_queued_sequences=1_000) as server,
        on_core(CLIENT_CORE),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(closed_loop.turn(server.target, given.streams, seconds, capacity, CONNECTIONS))
        steps_per_s = capacity.steps_per_s / 2
        for _ in track(range(given.turns), "turns"):
            runner.run(turn(server, given.streams, steps_per_s, seconds, alone))
            runner.run(disturbed_turn(server, given.streams, steps_per_s, seconds, disturbed))
    report(alone, disturbed, given.streams, steps_per_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
