"""The server that an engineer writes by hand: states in the handlers, a queue, one `nn.LSTM` call for all that wait.

It checks nothing, keeps nothing, and loses every state with its stream.

    python -m benchmarks.by_hand WEIGHTS
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop

from benchmarks.echo_server import serve
from benchmarks.stacked_lstm import StackedLstm, State
from rnnserve.v1.prediction_pb2 import Prediction
from rnnserve.v1.real_time_service_pb2 import (
    GenerateRequest,
    MultiplexStepsRequest,
    SessionOpened,
    StepsAnswer,
    StreamStepsRequest,
    StreamStepsResponse,
)
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceServicer
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

WINDOW_S = 0.002
MAX_BATCH = 256

Waiting = tuple[np.ndarray[Any, Any], State | None, "asyncio.Future[tuple[np.ndarray[Any, Any], State]]"]


class Server(RealTimeServiceServicer):
    """Opens any session, and answers steps until the stream ends."""

    def __init__(self, weights: Path) -> None:
        self._lstm = StackedLstm(weights)
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def StreamSteps(self, requests: AsyncIterator[StreamStepsRequest], context: Any) -> None:  # type: ignore[override]
        state = None
        async for request in requests:
            if request.HasField("open"):
                await context.write(StreamStepsResponse(opened=SessionOpened()))
                continue
            steps = request.steps
            x = np.frombuffer(steps.tensor.data, np.float32)
            answered = asyncio.get_running_loop().create_future()
            await self._queue.put((x, state, answered))
            output, state = await answered
            tensor = Tensor(data_type=DATA_TYPE_FLOAT32, shape=(1, len(output)), data=output.tobytes())
            answer = StepsAnswer(
                first_step=steps.first_step,
                next_step=steps.first_step + 1,
                prediction=Prediction(outputs=tensor),
            )
            await context.write(StreamStepsResponse(answer=answer))

    async def MultiplexSteps(self, _: AsyncIterator[MultiplexStepsRequest], context: Any) -> None:  # type: ignore[override]
        await context.abort(grpc.StatusCode.UNIMPLEMENTED)

    async def Generate(self, _: GenerateRequest, context: Any) -> None:  # type: ignore[override]
        await context.abort(grpc.StatusCode.UNIMPLEMENTED)

    async def run(self) -> None:
        """Wait for the first, then for others for a moment, then step all of them."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            until_s = loop.time() + WINDOW_S
            while len(batch) < MAX_BATCH and (left_s := until_s - loop.time()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left_s))
                except TimeoutError:
                    break
            outputs, states = await loop.run_in_executor(None, self._step, batch)
            for (_, _, answered), output, state in zip(batch, outputs, states, strict=True):
                if not answered.done():
                    answered.set_result((output, state))

    def _step(self, batch: list[Waiting]) -> tuple[np.ndarray[Any, Any], list[State]]:
        return self._lstm.step(np.stack([x for x, _, _ in batch]), [state for _, state, _ in batch])


async def main() -> None:
    """Until killed."""
    server = Server(Path(sys.argv[1]))
    await asyncio.gather(server.run(), serve(server))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
