"""The network behind mosec: its batcher with the least waiting time that it takes, bytes in and bytes out.

A request is a session's id of 16 bytes and the step's float32 values; the worker keeps the states.

    python -m benchmarks.peers.mosec_server --address 127.0.0.1 --port 8000
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from mosec import Server, Worker

from benchmarks.stacked_lstm import StackedLstm, State

MAX_BATCH = 256
MAX_WAIT_MS = 1  # less is not to be had
ID_BYTES = 16


class Steps(Worker):  # type: ignore[misc]
    """One process: states cannot be shared."""

    def __init__(self) -> None:
        super().__init__()
        self._lstm = StackedLstm(Path(os.environ["WEIGHTS"]))
        self._states: dict[bytes, State] = {}

    def deserialize(self, data: bytearray) -> bytes:
        return bytes(data)

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        ids = [request[:ID_BYTES] for request in data]
        x = np.frombuffer(b"".join(request[ID_BYTES:] for request in data), np.float32).reshape(len(data), -1)
        outputs, states = self._lstm.step(x.copy(), [self._states.get(key) for key in ids])
        self._states.update(zip(ids, states, strict=True))
        return [output.tobytes() for output in outputs]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Steps, num=1, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS)
    server.run()
