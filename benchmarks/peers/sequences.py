"""Whole sequences in the protocols of other servers, as close to the wire as rnnserve's own in benchmarks.sequences."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
from tritonclient.grpc import service_pb2_grpc

from benchmarks.network import MODEL
from benchmarks.peers import MOSEC
from benchmarks.peers.http import Connections
from benchmarks.peers.streams import infer_request, outputs_of
from benchmarks.sequence_load import Floats, Predict


def predicting(protocol: str, target: str) -> AbstractAsyncContextManager[Predict]:
    """As the peer of that name has it."""
    return _over_http(target) if protocol == MOSEC else _by_infer_calls(target)


@asynccontextmanager
async def _over_http(target: str) -> AsyncIterator[Predict]:
    connections = Connections(target)
    try:
        yield lambda values: connections.post(values.tobytes())
    finally:
        await connections.close()


@asynccontextmanager
async def _by_infer_calls(target: str) -> AsyncIterator[Predict]:
    """Of the Open Inference Protocol; a batch of one, which Triton's batcher joins with others."""
    async with grpc.aio.insecure_channel(target) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def predict(values: Floats) -> bytes:
            return outputs_of(await stub.ModelInfer(infer_request(MODEL, values[None])))

        yield predict
