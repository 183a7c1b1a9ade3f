"""Whole sequences of random lengths against one server, close to the wire: a turn of either loop, what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.network import FEATURES, MODEL
from benchmarks.turns import Server
from rnnserve.v1.sequence_service_pb2 import PredictRequest, Sequence
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

WARM_UP_S = 0.5
"""Under load, before a turn."""
LONGEST = 2_000

Floats = NDArray[np.float32]
Lengths = Callable[[np.random.Generator], int]
Predict = Callable[[Floats], Awaitable[bytes]]
"""From values (steps, features) to outputs as float32 bytes."""

# Drawn once: a sequence is a piece of it, which costs the client next to nothing.
_VALUES = np.random.default_rng(0).normal(size=(2 * LONGEST, FEATURES)).astype(np.float32)


def uniform(rng: np.random.Generator) -> int:
    """10 to 200 steps."""
    return int(rng.integers(10, 201))


def heavy_tailed(rng: np.random.Generator) -> int:
    """Log-normal: half of them have up to 40 steps, one in a hundred more than 400."""
    return min(max(1, round(float(rng.lognormal(np.log(40), 1.0)))), LONGEST)


LENGTHS: dict[str, Lengths] = {"uniform": uniform, "heavy-tailed": heavy_tailed}


@cache
def mean_steps(lengths: Lengths) -> float:
    """Of many."""
    rng = np.random.default_rng(0)
    return float(np.mean([lengths(rng) for _ in range(20_000)]))


class Answered(NamedTuple):
    """A sequence. Times in seconds from the beginning of its turn."""

    steps: int
    due_s: float
    answered_s: float


@dataclass(frozen=True)
class Turn:
    """All sequences that were sent for it, from the warm-up on, and were answered sooner or later."""

    sequences: list[Answered]
    seconds: float
    client_core: float = 0.0
    """Share of its core that the client was busy for meanwhile."""

    @property
    def answered(self) -> list[Answered]:
        """Those that were answered within it, whenever they were due."""
        return [one for one in self.sequences if 0 <= one.answered_s < self.seconds]

    @property
    def offered(self) -> list[Answered]:
        """Those that were due within it, whenever they were answered."""
        return [one for one in self.sequences if 0 <= one.due_s < self.seconds]

    @property
    def unanswered(self) -> int:
        """How many of those offered had no answer at the end."""
        return sum(one.answered_s >= self.seconds for one in self.offered)


def random_sequence(steps: int, rng: np.random.Generator) -> Floats:
    """Values (steps, features)."""
    first = int(rng.integers(2 * LONGEST - steps + 1))
    return _VALUES[first : first + steps]


@asynccontextmanager
async def _predicting(target: str) -> AsyncIterator[Predict]:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = SequenceServiceStub(channel)

        async def predict(values: Floats) -> bytes:
            tensor = Tensor(data_type=DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
            response = await stub.Predict(PredictRequest(model=MODEL, sequences=[Sequence(tensor=tensor)]))
            return response.predictions[0].outputs.data

        yield predict


def predicting(server: Server) -> AbstractAsyncContextManager[Predict]:
    """As the server's protocol has it."""
    if server.protocol == "rnnserve":
        return _predicting(server.target)
    from benchmarks.peers import sequences  # needs what `make bench-sequences` installs

    return sequences.predicting(server.protocol, server.target)


async def _timed(predict: Predict, values: Floats, due_s: float, start_s: float) -> Answered:
    await predict(values)
    return Answered(len(values), due_s - start_s, time.perf_counter() - start_s)


async def _client_core(start_s: float, seconds: float) -> float:
    await asyncio.sleep(start_s - time.perf_counter())
    from_s, used_s = time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - used_s) / (time.perf_counter() - from_s)


async def closed_loop(lengths: Lengths, in_flight: int, seconds: float, seed: int, predict: Predict) -> Turn:
    """So many callers, each with its next sequence as soon as the last is answered."""
    start_s = time.perf_counter() + WARM_UP_S

    async def call(rng: np.random.Generator) -> list[Answered]:
        sequences = []
        while (now_s := time.perf_counter()) < start_s + seconds:
            sequences.append(await _timed(predict, random_sequence(lengths(rng), rng), now_s, start_s))
        return sequences

    async with asyncio.TaskGroup() as group:
        busy = group.create_task(_client_core(start_s, seconds))
        calls = [group.create_task(call(np.random.default_rng([seed, i]))) for i in range(in_flight)]
    return Turn([one for ended in calls for one in ended.result()], seconds, busy.result())


async def open_loop(lengths: Lengths, steps_per_s: float, seconds: float, seed: int, predict: Predict) -> Turn:
    """Sequences of so many steps per second, in all, at random moments: of a seed always the same ones."""
    rng = np.random.default_rng(seed)
    every_s = mean_steps(lengths) / steps_per_s
    due_s = time.perf_counter()
    start_s = due_s + WARM_UP_S
    calls = []
    async with asyncio.TaskGroup() as group:
        busy = group.create_task(_client_core(start_s, seconds))
        while due_s < start_s + seconds:
            if (early_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(early_s)
            values = random_sequence(lengths(rng), rng)
            calls.append(group.create_task(_timed(predict, values, due_s, start_s)))
            due_s += float(rng.exponential(every_s))
    return Turn([call.result() for call in calls], seconds, busy.result())
