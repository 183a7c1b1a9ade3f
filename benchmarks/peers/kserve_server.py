"""The network behind the KServe SDK, over gRPC: it batches nothing, so each request is a step of its own.

A request's id is its session's; the model keeps the states.

    python -m benchmarks.peers.kserve_server WEIGHTS GRPC_PORT HTTP_PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer

from benchmarks.network import MODEL
from benchmarks.stacked_lstm import StackedLstm, State


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
        tensor = InferOutput("y", list(outputs.shape), "FP32")
        tensor.set_data_from_numpy(outputs)
        return InferResponse(payload.id, self.name, [tensor])


if __name__ == "__main__":
    weights, grpc_port, http_port = sys.argv[1:]
    ModelServer(grpc_port=int(grpc_port), http_port=int(http_port), workers=1).start([Steps(Path(weights))])
