"""The network in Triton's Python backend: the sequence batcher hands over the steps of many sequences together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from benchmarks.stacked_lstm import StackedLstm, State


class TritonPythonModel:
    """Triton looks for a class of this name. It keeps the states, by the sequences' ids."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self._lstm = StackedLstm(folder / "weights.safetensors")
        self._states: dict[int, State] = {}

    def execute(self, requests: list[Any]) -> list[Any]:
        def of_all(name: str) -> np.ndarray[Any, Any]:
            return np.concatenate([triton.get_input_tensor_by_name(r, name).as_numpy() for r in requests])

        ids, ends = of_all("ID")[:, 0].tolist(), of_all("END")[:, 0].tolist()
        outputs, states = self._lstm.step(of_all("x"), [self._states.get(key) for key in ids])
        self._states.update(zip(ids, states, strict=True))
        for key, end in zip(ids, ends, strict=True):
            if end:
                del self._states[key]
        return [triton.InferenceResponse([triton.Tensor("y", output[None])]) for output in outputs]
