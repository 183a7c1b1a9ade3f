"""The network in Triton's Python backend: the dynamic batcher hands over sequences of different lengths together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as triton

from benchmarks.packed_lstm import PackedLstm


class TritonPythonModel:
    """Triton looks for a class of this name."""

    def initialize(self, args: dict[str, str]) -> None:
        self._lstm = PackedLstm(Path(args["model_repository"]) / args["model_version"] / "weights.safetensors")

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = (triton.get_input_tensor_by_name(request, "x").as_numpy() for request in requests)
        outputs = self._lstm.run([torch.from_numpy(values) for (values,) in inputs])
        return [triton.InferenceResponse([triton.Tensor("y", output[None])]) for output in outputs]
