"""Live streams close to the wire, so that the client costs little: one of random steps, and what they load."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from rnnserve.v1.real_time_service_pb2 import (
    MultiplexStepsRequest,
    MultiplexStepsResponse,
    OpenHandle,
    OpenSession,
    Steps,
    StreamStepsRequest,
    StreamStepsResponse,
)
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

if TYPE_CHECKING:
    from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceAsyncStub

FEATURES = 12
MODEL = "speaker"
MAX_AHEAD = 4


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


class Stream(Protocol):
    """A session that steps again and again."""

    values: NDArray[np.float32]
    """Of each step, (1, features)."""

    async def send(self, step: int) -> None:
        """The step of this index."""

    async def answer(self) -> bytes:
        """Outputs of the next step as float32 values, once they have come. Raises RuntimeError for something else."""
        ...


class LiveStream:
    """One call that sends the same random step again and again. Its session can be resumed, so it is stored."""

    def __init__(self, stub: RealTimeServiceAsyncStub, model: str = MODEL, features: int = FEATURES) -> None:
        self._model = model
        self.values = np.random.default_rng().normal(size=(1, features)).astype(np.float32)
        self._tensor = Tensor(data_type=DATA_TYPE_FLOAT32, shape=self.values.shape, data=self.values.tobytes())
        self._call = stub.StreamSteps()
        self._answered_step = 0

    async def open(self) -> None:
        opening = OpenSession(model=self._model, session_id=uuid.uuid4().hex, resume_token=secrets.token_bytes(16))
        await self._call.write(StreamStepsRequest(open=opening))
        await self._call.read()

    async def send(self, step: int) -> None:
        """The step of this index; acknowledges all answers that have come."""
        steps = Steps(first_step=step, tensor=self._tensor)
        await self._call.write(StreamStepsRequest(steps=steps, answered_step=self._answered_step))

    async def answer(self) -> bytes:
        """As Stream has it."""
        response = await self._call.read()
        while isinstance(response, StreamStepsResponse) and response.HasField("checkpoint"):
            response = await self._call.read()
        if not isinstance(response, StreamStepsResponse) or response.answer.next_step <= self._answered_step:
            raise RuntimeError(f"not an answer: {response}")
        self._answered_step += 1
        return response.answer.prediction.outputs.data

    async def close(self) -> None:
        await self._call.done_writing()


@asynccontextmanager
async def opened(
    targets: Sequence[str], streams: int, connections: int, model: str = MODEL, features: int = FEATURES
) -> AsyncIterator[list[LiveStream]]:
    """So many streams, spread over so many connections, spread over the targets."""
    async with AsyncExitStack() as stack:
        stubs = []
        for number in range(connections):
            own = [("grpc.use_local_subchannel_pool", 1)]  # or channels to a target would share a connection
            channel = grpc.aio.insecure_channel(targets[number % len(targets)], options=own)
            stubs.append(RealTimeServiceStub(await stack.enter_async_context(channel)))
        opened = [LiveStream(stubs[number % connections], model, features) for number in range(streams)]
        await asyncio.gather(*(stream.open() for stream in opened))
        yield opened
        await asyncio.gather(*(stream.close() for stream in opened))


class MultiplexedCall:
    """One call that sends the same random step of many sessions again and again."""

    def __init__(self, stub: RealTimeServiceAsyncStub, sessions: int, model: str, features: int) -> None:
        self._model = model
        self._values = np.random.default_rng().normal(size=(sessions, features)).astype("<f4")
        self._call = stub.MultiplexSteps()
        self._sent_s = np.zeros((sessions, MAX_AHEAD))

    async def open(self) -> None:
        """A session for each handle, which is the number of its row. Raises RuntimeError if one is refused."""
        await asyncio.gather(self._send_opens(), self._read_opened())  # who does not read is not read from, either

    async def _send_opens(self) -> None:
        for handle in range(len(self._values)):
            opening = OpenSession(model=self._model, session_id=uuid.uuid4().hex, resume_token=secrets.token_bytes(16))
            await self._call.write(MultiplexStepsRequest(open=OpenHandle(handle=handle, open=opening)))

    async def _read_opened(self) -> None:
        for _ in self._values:
            _checked(await self._read(), "opened")

    async def _read(self) -> object:
        """What is not only about durability."""
        response: object = await self._call.read()
        while isinstance(response, MultiplexStepsResponse) and response.HasField("durable"):
            response = await self._call.read()
        return response

    async def send(self, handles: Sequence[int], steps: Sequence[int], answered_steps: Sequence[int]) -> None:
        """A step of each of these, with its index."""
        request = MultiplexStepsRequest()
        batch = request.steps
        batch.handles.extend(handles)
        batch.first_steps.extend(steps)
        batch.answered_steps.extend(answered_steps)
        batch.tensor.data_type = DATA_TYPE_FLOAT32
        batch.tensor.shape.extend((len(handles), self._values.shape[1]))
        batch.tensor.data = self._values[: len(handles)].tobytes()
        self._sent_s[handles, np.array(steps) % MAX_AHEAD] = time.perf_counter()
        await self._call.write(request)

    async def answer(self) -> tuple[float, list[int], list[int]]:
        """When the first of these steps was sent, their handles and indices. Raises RuntimeError for a refusal."""
        answer = _checked(await self._read(), "answer").answer
        handles, steps = list(answer.handles), list(answer.first_steps)
        return self._sent_s[handles[0], steps[0] % MAX_AHEAD], handles, steps

    async def close(self) -> None:
        self._call.cancel()


def _checked(response: object, kind: str) -> MultiplexStepsResponse:
    if not isinstance(response, MultiplexStepsResponse) or response.WhichOneof("response") != kind:
        raise RuntimeError(f"not {kind}: {response}")
    return response


@asynccontextmanager
async def multiplexed(target: str, sessions: int, model: str, features: int) -> AsyncIterator[MultiplexedCall]:
    """So many sessions on one stream."""
    async with grpc.aio.insecure_channel(target) as channel:
        call = MultiplexedCall(RealTimeServiceStub(channel), sessions, model, features)
        await call.open()
        yield call
        await call.close()
