"""The step that an engineer writes: the states of all sessions stacked, one `nn.LSTM` call, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

State = tuple[torch.Tensor, torch.Tensor]
"""Hidden and cell state of one session, (hidden_size,) each."""


def network_of(weights: Path) -> tuple[torch.nn.LSTM, torch.nn.Linear]:
    """The recurrent and the output layers of a bundle's weights. From then on torch computes in one thread."""
    torch.set_num_threads(1)
    tensors = load_file(weights)
    gates, features = tensors["recurrent.weight_ih_l0"].shape
    backward = "recurrent.weight_ih_l0_reverse" in tensors
    layers = sum(name.startswith("recurrent.weight_ih_") for name in tensors) // (1 + backward)
    lstm = torch.nn.LSTM(features, gates // 4, layers, bidirectional=backward)
    output = torch.nn.Linear((1 + backward) * gates // 4, len(tensors["output.bias"]))
    for prefix, layer in (("recurrent.", lstm), ("output.", output)):
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return lstm, output


class StackedLstm:
    """Needs torch, numpy and safetensors alone, so that it runs in the environments of other servers."""

    def __init__(self, weights: Path) -> None:
        """From a bundle's weights; one thread."""
        self._lstm, self._output = network_of(weights)
        self._start = torch.zeros(self._lstm.hidden_size), torch.zeros(self._lstm.hidden_size)

    @torch.inference_mode()
    def step(self, x: np.ndarray[Any, Any], states: Sequence[State | None]) -> tuple[np.ndarray[Any, Any], list[State]]:
        """Outputs (B, outputs) and the next states for inputs (B, features) and B states; None is a session's start."""
        pairs = [state or self._start for state in states]
        h = torch.stack([h for h, _ in pairs]).unsqueeze(0)
        c = torch.stack([c for _, c in pairs]).unsqueeze(0)
        hidden, (h, c) = self._lstm(torch.from_numpy(x).unsqueeze(0), (h, c))
        return self._output(hidden[0]).numpy(), list(zip(h[0], c[0], strict=True))
