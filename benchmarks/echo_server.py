"""What the transport alone can do: sends the steps of each message back and computes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from rnnserve.v1.prediction_pb2 import Prediction
from rnnserve.v1.real_time_service_pb2 import (
    GenerateRequest,
    MultiplexStepsRequest,
    MultiplexStepsResponse,
    SessionOpened,
    StepsAnswer,
    StreamStepsRequest,
    StreamStepsResponse,
)
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceServicer, add_RealTimeServiceServicer_to_server


class Echo(RealTimeServiceServicer):
    """Opens any session and sends the steps back as the outputs."""

    async def StreamSteps(self, requests: AsyncIterator[StreamStepsRequest], context: object) -> None:  # type: ignore[override]
        async for request in requests:
            if request.HasField("open"):
                response = StreamStepsResponse(opened=SessionOpened())
            else:
                steps = request.steps
                answer = StepsAnswer(
                    first_step=steps.first_step,
                    next_step=steps.first_step + 1,
                    prediction=Prediction(outputs=steps.tensor),
                )
                response = StreamStepsResponse(answer=answer)
            await context.write(response)  # type: ignore[attr-defined]

    async def MultiplexSteps(self, requests: AsyncIterator[MultiplexStepsRequest], context: object) -> None:  # type: ignore[override]
        async for request in requests:
            response = MultiplexStepsResponse()
            if request.HasField("open"):
                response.opened.handle = request.open.handle
            else:
                response.answer.handles.extend(request.steps.handles)
                response.answer.first_steps.extend(request.steps.first_steps)
                response.answer.prediction.outputs.CopyFrom(request.steps.tensor)
            await context.write(response)  # type: ignore[attr-defined]

    async def Generate(self, _: GenerateRequest, context: Any) -> None:  # type: ignore[override]
        await context.abort(grpc.StatusCode.UNIMPLEMENTED)


async def serve(servicer: RealTimeServiceServicer) -> None:
    """Print the port and serve until killed."""
    server = grpc.aio.server()
    add_RealTimeServiceServicer_to_server(servicer, server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Echo()))
