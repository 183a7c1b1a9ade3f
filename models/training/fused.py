"""The recurrent layers by torch's own kernels, which train up to four times as fast as step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from models.recurrent import RecurrentStack, Values


class FusedStack(RecurrentStack):
    """The same parameters and, but for the order of sums, the same answers, of cells with one transition layer.

    Rows are read to the end of the longest, so final values are those of rows that are as long as that.
    """

    def _run(self, inputs: Tensor, lengths: Tensor, values: Values, suffix: str) -> tuple[Tensor, Values]:
        if self.spec.transition_layers > 1:
            return super()._run(inputs, lengths, values, suffix)
        names = (f"weight_ih_{suffix}", f"weight_hh_{suffix}", f"bias_ih_{suffix}", f"bias_hh_{suffix}")
        weights: list[Tensor] = [self.get_parameter(name) for name in names]
        start = [value.unsqueeze(0) for value in values]
        # with biases, one layer, no dropout within it, in training, one direction, the batch first
        if self.spec.cell == "lstm":
            outputs, *after = torch.lstm(inputs, start, weights, True, 1, 0.0, True, False, True)
        else:
            kernel = {"gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[self.spec.cell]
            outputs, *after = kernel(inputs, start[0], weights, True, 1, 0.0, True, False, True)
        return outputs, tuple(value.squeeze(0) for value in after)
