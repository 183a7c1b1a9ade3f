"""What an engineer calls for whole sequences of different lengths: `nn.LSTM` over a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from benchmarks.stacked_lstm import network_of


class PackedLstm:
    """Needs torch, numpy and safetensors alone, so that it runs in the environments of other servers."""

    def __init__(self, weights: Path) -> None:
        """From a bundle's weights; one thread."""
        self._lstm, self._output = network_of(weights)

    @property
    def features(self) -> int:
        return self._lstm.input_size

    @torch.inference_mode()
    def run(self, sequences: Sequence[torch.Tensor]) -> list[NDArray[np.float32]]:
        """Outputs (steps, outputs) of each sequence (steps, features)."""
        hidden, _ = self._lstm(pack_sequence(list(sequences), enforce_sorted=False))
        outputs = hidden._replace(data=self._output(hidden.data))
        return [output.numpy() for output in unpack_sequence(outputs)]
