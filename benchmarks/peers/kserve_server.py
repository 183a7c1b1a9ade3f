"""The network behind the KServe SDK, over gRPC: it batches nothing, so each request is computed by itself.

- steps: a request's id is its session's; the model keeps the states;
- sequences: a request has all steps of one.

    python -m benchmarks.peers.kserve_server steps WEIGHTS GRPC_PORT HTTP_PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

from benchmarks.network import MODEL
from benchmarks.packed_lstm import PackedLstm
from benchmarks.stacked_lstm import StackedLstm, State


def response_to(request: InferRequest, outputs: np.ndarray[Any, Any]) -> InferResponse:
    """With these outputs."""
    tensor = InferOutput("y", list(outputs.shape), "FP32")
    tensor.set_data_from_numpy(outputs)
    return InferResponse(request.id, MODEL, [tensor])


class Steps(Model):  # type: ignore[misc]
    """Answers one step after the other."""

    def __init__(self, weights: Path) -> None:
        super().__init__(MODEL)
        self._lstm = StackedLstm(weights)
        self._states: dict[str, State] = {}
        self.ready = True

    async def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
        outputs, (state,) = self._lstm.step(payload.inputs[0].as_numpy().copy(), [self._states.get(payload.id)])
        self._states[payload.id] = state
        return response_to(payload, outputs)


class Sequences(Model):  # type: ignore[misc]
    """Answers one sequence after the other."""

    def __init__(self, weights: Path) -> None:
        super().__init__(MODEL)
        self._lstm = PackedLstm(weights)
        self.ready = True

    async def predict(self, payload: InferRequest, *_: Any, **__: Any) -> InferResponse:
        (values,) = payload.inputs[0].as_numpy().copy()
        (outputs,) = self._lstm.run([torch.from_numpy(values)])
        return response_to(payload, outputs[None])


if __name__ == "__main__":
    work, weights, grpc_port, http_port = sys.argv[1:]
    model = (Steps if work == "steps" else Sequences)(Path(weights))
    ModelServer(grpc_port=int(grpc_port), http_port=int(http_port), workers=1).start([model])
