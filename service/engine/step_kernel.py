"""One step of each of several sessions of a streamable network, in as few calls of torch as there can be.

A step of a small network costs what its calls cost, not its arithmetic (Zhang et al., "DeepCPU", USENIX ATC 2018). So
all weights are looked up once, and torch's own cells take the place of a cell's equations; they have the same. Those
would make the state bfloat16 where the weights are, so there the equations stay, with both products of a cell in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.predictor import Predictor
from models.recurrent import CELL_STEPS, Cell, RecurrentStack, Values, gru_step, linear, lstm_values

Weights = tuple[Tensor, ...]


def _lstm(inputs: Tensor, values: Values, *weights: Tensor) -> Values:
    return torch.lstm_cell(inputs, values, *weights)


def _gru(inputs: Tensor, values: Values, *weights: Tensor) -> Values:
    return (torch.gru_cell(inputs, values[0], *weights),)


def _tanh(inputs: Tensor, values: Values, *weights: Tensor) -> Values:
    return (torch.rnn_tanh_cell(inputs, values[0], *weights),)


def _relu(inputs: Tensor, values: Values, *weights: Tensor) -> Values:
    return (torch.rnn_relu_cell(inputs, values[0], *weights),)


CELLS: dict[Cell, Callable[..., Values]] = {"tanh": _tanh, "relu": _relu, "gru": _gru, "lstm": _lstm}


def _gates(inputs: Tensor, values: Values, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(torch.cat([inputs, values[0]], dim=1), weight, bias)


def _bfloat16_lstm(inputs: Tensor, values: Values, weight: Tensor, bias: Tensor) -> Values:
    return lstm_values(_gates(inputs, values, weight, bias), values[1])


def _bfloat16_gru(inputs: Tensor, values: Values, *weights: Tensor) -> Values:
    weight_ih, weight_hh, bias_ih, bias_hh = weights  # apart: the reset gate acts on the hidden product alone
    return gru_step(linear(inputs, weight_ih, bias_ih), values, weight_hh, bias_hh)


def _bfloat16_tanh(inputs: Tensor, values: Values, weight: Tensor, bias: Tensor) -> Values:
    return (torch.tanh(_gates(inputs, values, weight, bias)),)


def _bfloat16_relu(inputs: Tensor, values: Values, weight: Tensor, bias: Tensor) -> Values:
    return (torch.relu(_gates(inputs, values, weight, bias)),)


BFLOAT16_CELLS: dict[Cell, Callable[..., Values]] = {
    "tanh": _bfloat16_tanh, "relu": _bfloat16_relu, "gru": _bfloat16_gru, "lstm": _bfloat16_lstm,
}  # fmt: skip


class StepKernel:
    """A predictor's network, one step at a time, with the weights that it has when this is made."""

    def __init__(self, predictor: Predictor) -> None:
        network, spec = predictor.network, predictor.network.spec
        self._predictor = predictor
        self._embedding = None if network.embedding is None else network.embedding.weight.detach()
        self._input_layers = _linear_layers(network.input_block)
        self._layers = [_layer(network.recurrent, layer) for layer in range(spec.layers)]
        is_bfloat16 = self._layers[0][0][0].dtype == torch.bfloat16
        self._cell, self._deeper_cell = (BFLOAT16_CELLS if is_bfloat16 else CELLS)[spec.cell], CELL_STEPS[spec.cell]
        self._output_layers = _linear_layers(network.output_block)
        self._output = network.output.weight.detach(), network.output.bias.detach()
        self._values = spec.state_layout.values_per_layer
        held = predictor.row_size - spec.state_layout.size
        self._split = [spec.hidden_size] * (spec.layers * self._values) + ([held] if held else [])

    def step(self, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """values (batch, features) or (batch,), rows (batch, row_size) -> outputs (batch, outputs), new rows."""
        state = rows.split_with_sizes(self._split, dim=1)
        inputs, held = self._predictor.normalised(values, state[-1])  # the last part is what is held, if anything is
        new_state: list[Tensor] = []
        if self._embedding is not None:
            inputs = functional.embedding(inputs, self._embedding)
        hidden = _feed(inputs, self._input_layers)
        for layer, (weights, deeper) in enumerate(self._layers):
            new = self._cell(hidden, state[layer * self._values : (layer + 1) * self._values], *weights)
            for weight_hh, bias_ih, bias_hh in deeper:
                new = self._deeper_cell(bias_ih, new, weight_hh, bias_hh)
            new_state += new
            hidden = new[0]
        outputs = functional.linear(_feed(hidden, self._output_layers), *self._output)
        return outputs, torch.cat([*new_state, *held], dim=1)


def _layer(stack: RecurrentStack, layer: int) -> tuple[Weights, list[Weights]]:
    """Of its first cell, and of those of a deep transition, which see no input."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    first, *deeper = (f"l{layer}", *(f"l{layer}_t{depth}" for depth in range(1, stack.spec.transition_layers)))
    weights = _weights(stack, names, first)
    if weights[0].dtype == torch.bfloat16 and stack.spec.cell != "gru":
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        weights = torch.cat([weight_ih, weight_hh], dim=1), bias_ih + bias_hh
    return weights, [_weights(stack, ("weight_hh", "bias_ih", "bias_hh"), cell) for cell in deeper]


def _weights(stack: RecurrentStack, names: Iterable[str], cell: str) -> Weights:
    return tuple(_laid_out(stack.get_parameter(f"{name}_{cell}").detach()) for name in names)


def _laid_out(weight: Tensor) -> Tensor:
    """The same values, those of a matrix column by column: faster for most batches (benchmarks.kernels).

    bfloat16 stays row by row, as its products want it.
    """
    return weight if weight.dim() == 1 or weight.dtype == torch.bfloat16 else weight.t().contiguous().t()


def _linear_layers(block: nn.Sequential) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight.detach(), layer.bias.detach()) for layer in block if isinstance(layer, nn.Linear)]


def _feed(inputs: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    for weight, bias in layers:
        inputs = torch.relu(linear(inputs, weight, bias))
    return inputs
