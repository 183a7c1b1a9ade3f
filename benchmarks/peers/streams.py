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
from benchmarks.peers.http import body_of

MOSEC, TRITON, KSERVE = "mosec", "triton", "kserve"


class PeerStream(Stream, Protocol):
    """A session of a peer."""

    async def open(self) -> None:
        """Before the first step."""

    async def close(self) -> None:
        """After the last answer."""


def random_step(features: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of shape (1, features)."""
    return np.random.default_rng().normal(size=(1, features)).astype(np.float32)


class MosecStream(asyncio.Protocol):
    """HTTP on a connection that stays open; the server knows the session by the id in each request."""

    def __init__(self, target: str, features: int) -> None:
        self._host, _, self._port = target.partition(":")
        self.values = random_step(features)
        body = uuid.uuid4().bytes + self.values.tobytes()
        head = f"POST /inference HTTP/1.1\r\nHost: {target}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._received = b""

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._answered = loop.create_future()
        self._transport, _ = await loop.create_connection(lambda: self, self._host, int(self._port))

    async def send(self, step: int) -> None:
        self._transport.write(self._request)

    async def answer(self) -> bytes:
        body: bytes = await self._answered
        self._answered = asyncio.get_running_loop().create_future()
        return body

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            body = body_of(self._received)
        except RuntimeError as refusal:
            self._answered.set_exception(refusal)
            return
        if body is not None:
            self._received = b""
            self._answered.set_result(body)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_exception(RuntimeError("mosec has closed the connection"))
            self._answered.exception()  # nobody may be waiting

    async def close(self) -> None:
        self._transport.close()


class InferRequests:
    """Of the Open Inference Protocol, which Triton and KServe share: one step as float32 bytes."""

    def __init__(self, model: str, features: int) -> None:
        self.values = random_step(features)
        self.request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[self.values.tobytes()])
        self.request.inputs.add(name="x", datatype="FP32", shape=self.values.shape)


class TritonStream(InferRequests):
    """A sequence of Triton's on a gRPC stream of its own."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub, model: str, features: int) -> None:
        super().__init__(model, features)
        self.request.parameters["sequence_id"].int64_param = secrets.randbits(62) + 1
        self._call = stub.ModelStreamInfer()

    async def open(self) -> None:
        pass

    async def send(self, step: int) -> None:
        self.request.parameters["sequence_start"].bool_param = step == 0
        await self._call.write(self.request)

    async def answer(self) -> bytes:
        response = await self._call.read()
        if response is grpc.aio.EOF or response.error_message:
            raise RuntimeError(f"not an answer: {response}")
        outputs: bytes = response.infer_response.raw_output_contents[0]
        return outputs

    async def close(self) -> None:
        self.request.parameters["sequence_end"].bool_param = True
        await self.send(1)
        await self.answer()
        await self._call.done_writing()


class KserveStream(InferRequests):
    """Calls of the KServe SDK's server, which has no gRPC streams; it knows the session by the requests' id."""

    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub, model: str, features: int) -> None:
        super().__init__(model, features)
        self.request.id = uuid.uuid4().hex
        self._stub = stub

    async def open(self) -> None:
        pass

    async def send(self, step: int) -> None:
        self._call = self._stub.ModelInfer(self.request)

    async def answer(self) -> bytes:
        response = await self._call
        if response.raw_output_contents:
            outputs: bytes = response.raw_output_contents[0]
            return outputs
        return np.array(response.outputs[0].contents.fp32_contents, np.float32).tobytes()

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
