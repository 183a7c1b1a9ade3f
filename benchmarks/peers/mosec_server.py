"""The network behind mosec: its batcher, bytes in and bytes out. The variable WORK says what a request is.

- steps: a session's id of 16 bytes and a step's float32 values; the worker keeps the states;
- sequences: the float32 values of all steps.

    WORK=steps WEIGHTS=weights.safetensors python -m benchmarks.peers.mosec_server --address 127.0.0.1 --port 8000
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mosec import Server, Worker

from benchmarks.packed_lstm import PackedLstm
from benchmarks.stacked_lstm import StackedLstm, State

ID_BYTES = 16
WEIGHTS = Path(os.environ["WEIGHTS"])


class Steps(Worker):  # type: ignore[misc]
    """One process: states cannot be shared."""

    def __init__(self) -> None:
        super().__init__()
        self._lstm = StackedLstm(WEIGHTS)
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


class Sequences(Worker):  # type: ignore[misc]
    """Those of a batch in one call."""

    def __init__(self) -> None:
        super().__init__()
        self._lstm = PackedLstm(WEIGHTS)

    def deserialize(self, data: bytearray) -> torch.Tensor:
        return torch.frombuffer(data, dtype=torch.float32).view(-1, self._lstm.features)

    def serialize(self, data: np.ndarray[Any, Any]) -> bytes:
        return data.tobytes()

    def forward(self, data: list[torch.Tensor]) -> list[np.ndarray[Any, Any]]:
        return self._lstm.run(data)


if __name__ == "__main__":
    server = Server()
    if os.environ["WORK"] == "steps":
        server.append_worker(Steps, max_batch_size=256, max_wait_time=1)  # ms; less is not to be had
    else:
        server.append_worker(Sequences, max_batch_size=64, max_wait_time=2)
    server.run()
