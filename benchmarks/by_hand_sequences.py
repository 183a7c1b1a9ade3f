"""Two servers of whole sequences that an engineer writes by hand: a queue, and one batch at a time in a thread.

padded: those that wait, in order, padded to the longest. bucketed: the longest waiting one and those nearest to it in
length, packed, in one `nn.LSTM` call.

    python -m benchmarks.by_hand_sequences REPOSITORY padded
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
import uvloop
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.network import MODEL, weights_file
from benchmarks.packed_lstm import PackedLstm
from models.bundle import Bundle, load_bundle
from rnnserve.v1.prediction_pb2 import Prediction
from rnnserve.v1.sequence_service_pb2 import PredictRequest, PredictResponse
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceServicer, add_SequenceServiceServicer_to_server
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32
from rnnserve.v1.tensor_pb2 import Tensor as WireTensor

MAX_BATCH = 64
MAX_BUCKET = 32
WINDOW_S = 0.002

Floats = NDArray[np.float32]
Run = Callable[[list[Tensor]], list[Floats]]


def padded(bundle: Bundle) -> Run:
    """The project's own network over (batch, longest)."""

    @torch.inference_mode()
    def run(sequences: list[Tensor]) -> list[Floats]:
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        outputs = bundle.predictor.run(pad_sequence(sequences, batch_first=True), lengths)
        return [row[:length].numpy() for row, length in zip(outputs, lengths.tolist(), strict=True)]

    return run


class Server(SequenceServiceServicer):
    """Checks nothing."""

    def __init__(self, run: Run, *, bucketed: bool) -> None:
        self._run = run
        self._bucketed = bucketed
        self._waiting: list[tuple[Tensor, asyncio.Future[Floats]]] = []
        self._come = asyncio.Event()
        # torch's number of threads is one of each thread.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    async def Predict(self, request: PredictRequest, context: Any) -> PredictResponse:  # noqa: ARG002
        (sequence,) = request.sequences
        values = torch.from_numpy(np.frombuffer(bytearray(sequence.tensor.data), np.float32))
        answered = asyncio.get_running_loop().create_future()
        self._waiting.append((values.view(*sequence.tensor.shape), answered))
        self._come.set()
        outputs = await answered
        tensor = WireTensor(data_type=DATA_TYPE_FLOAT32, shape=outputs.shape, data=outputs.tobytes())
        return PredictResponse(predictions=[Prediction(outputs=tensor)])

    async def PredictStream(self, requests: Any, context: Any) -> None:  # type: ignore[override]
        """Not served."""

    async def work(self) -> None:
        while True:
            await self._come.wait()
            await asyncio.sleep(WINDOW_S)
            while self._waiting:
                batch = self._take()
                sequences = [values for values, _ in batch]
                outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, sequences)
                for (_, answered), output in zip(batch, outputs, strict=True):
                    if not answered.done():
                        answered.set_result(output)
            self._come.clear()

    def _take(self) -> list[tuple[Tensor, asyncio.Future[Floats]]]:
        if not self._bucketed:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            return batch
        steps = len(self._waiting[0][0])
        order = sorted(range(len(self._waiting)), key=lambda i: abs(len(self._waiting[i][0]) - steps))
        taken = set(order[:MAX_BUCKET])
        batch = [one for i, one in enumerate(self._waiting) if i in taken]
        self._waiting = [one for i, one in enumerate(self._waiting) if i not in taken]
        return batch


async def serve(repository: Path, kind: str) -> None:
    """Print the port and serve until killed."""
    run: Run
    if kind == "padded":
        run = padded(load_bundle(repository / MODEL / "1"))
    else:
        run = PackedLstm(weights_file(repository)).run
    server, servicer = grpc.aio.server(), Server(run, bucketed=kind == "bucketed")
    add_SequenceServiceServicer_to_server(servicer, server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await servicer.work()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1]), sys.argv[2]))
