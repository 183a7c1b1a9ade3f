"""Streams in the protocols of other servers, as close to the wire as rnnserve's own in benchmarks.live."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.live import Stream
from benchmarks.peers import MOSEC, TRITON
from benchmarks.peers.http import Connection


class PeerStream(Stream, Protocol):
    """A session of a peer."""

    async def open(self) -> None:
        """Before the first step."""

    async def close(self) -> None:
        """After the last answer."""


def random_step(features: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of shape (1, features)."""
    return np.random.default_rng().normal(size=(1, features)).astype(np.float32)


class MosecStream(Connection):
    """The server knows the session by the id in each request."""

    def __init__(self, target: str, features: int) -> None:
        super().__init__(target)
        self.values = random_step(features)
        self._request = self.request_with(uuid.uuid4().bytes + self.values.tobytes())

    async def send(self, step: int) -> None:
        self.write(self._request)


def infer_request(model: str, values: np.ndarray[Any, Any]) -> service_pb2.ModelInferRequest:
    """Of the Open Inference Protocol, which Triton and KServe share: float32 values as bytes."""
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[values.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=values.shape)
    return request


def outputs_of(response: service_pb2.ModelInferResponse) -> bytes:
    """Float32 values; KServe's server gives those of some requests as numbers."""
    if response.raw_output_contents:
        outputs: bytes = response.raw_output_contents[0]
        return outputs
    return np.array(response.outputs[0].contents.fp32_contents, np.float32).tobytes()


class TritonStream:
    """A sequence of Triton's on a gRPC stream of its own."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub, model: str, features: int) -> None:
        self.values = random_step(features)
        self._request = infer_request(model, self.values)
        self._request.parameters["sequence_id"].int64_param = secrets.randbits(62) + 1
        self._call = stub.ModelStreamInfer()

    async def open(self) -> None:
        pass

    async def send(self, step: int) -> None:
        self._request.parameters["sequence_start"].bool_param = step == 0
        await self._call.write(self._request)

    async def answer(self) -> bytes:
        response = await self._call.read()
        if response is grpc.aio.EOF or response.error_message:
            raise RuntimeError(f"not an answer: {response}")
        return outputs_of(response.infer_response)

    async def close(self) -> None:
        self._request.parameters["sequence_end"].bool_param = True
        await self.send(1)
        await self.answer()
        await self._call.done_writing()


class KserveStream:
    """Calls of the KServe SDK's server, which has no gRPC streams; it knows the session by the requests' id."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub, model: str, features: int) -> None:
        self.values = random_step(features)
        self._request = infer_request(model, self.values)
        self._request.id = uuid.uuid4().hex
        self._stub = stub

    async def open(self) -> None:
        pass

    async def send(self, step: int) -> None:
        self._call = self._stub.ModelInfer(self._request)

    async def answer(self) -> bytes:
        return outputs_of(await self._call)

    async def close(self) -> None:
        pass


@asynccontextmanager
async def opened(
    protocol: str, target: str, streams: int, model: str, features: int
) -> AsyncIterator[list[PeerStream]]:
    """So many; those over gRPC share a connection."""
    async with AsyncExitStack() as stack:
        made: list[PeerStream]
        if protocol == MOSEC:
            made = [MosecStream(target, features) for _ in range(streams)]
        else:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target))
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            made = [
                (TritonStream if protocol == TRITON else KserveStream)(stub, model, features) for _ in range(streams)
            ]
        await asyncio.gather(*(stream.open() for stream in made))
        yield made
        await asyncio.gather(*(stream.close() for stream in made))
