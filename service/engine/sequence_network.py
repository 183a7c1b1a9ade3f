"""A predictor's network for whole sequences: stages of lanes, each of which computes some steps of a batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.manifest import ModelKey
from models.predictor import Predictor
from models.recurrent import CELL_STEPS, NetworkSpec, RecurrentStack, Values, linear
from models.seq2seq import EncoderDecoder

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
LSTM_MODE = 2  # of torch.mkldnn_rnn_layer
LARGE_BYTES, FEW = 2 * 2**20, range(2, 9)
"""Weights that leave the cache of many a core at each step, and how many sequences may then pay for it."""
TRIED_STEPS, TRIED_SEQUENCES, TRIES = 32, 4, 5
"""Of the measurement whether they do."""


class LayerKernel(Protocol):
    """Some steps of one layer in one direction."""

    def run(self, inputs: Tensor, values: Values) -> tuple[Tensor, Values]:
        """inputs (steps, batch, width), values each (batch, hidden) -> (steps, batch, hidden), values after them."""
        ...


class CellLayer:
    """Any cell: all input products of the steps in one, the hidden ones step by step."""

    def __init__(self, stack: RecurrentStack, suffix: str) -> None:
        self._step = CELL_STEPS[stack.spec.cell]
        self._weight_ih = _weight(stack, f"weight_ih_{suffix}")
        self._bias_ih = _weight(stack, f"bias_ih_{suffix}")
        cells = [suffix, *(f"{suffix}_t{depth}" for depth in range(1, stack.spec.transition_layers))]
        self._hidden = [(_weight(stack, f"weight_hh_{cell}"), _weight(stack, f"bias_hh_{cell}")) for cell in cells]
        self._deeper_gates = [_weight(stack, f"bias_ih_{cell}") for cell in cells[1:]]

    def run(self, inputs: Tensor, values: Values) -> tuple[Tensor, Values]:
        outputs = []
        for gates in linear(inputs, self._weight_ih, self._bias_ih):
            for own, (weight_hh, bias_hh) in zip([gates, *self._deeper_gates], self._hidden, strict=True):
                values = self._step(own, values, weight_hh, bias_hh)
            outputs.append(values[0])
        return torch.stack(outputs), values


class LstmSteps:
    """An LSTM layer as CellLayer has it, with its few operations in place; products may be bfloat16."""

    def __init__(self, stack: RecurrentStack, suffix: str) -> None:
        self._weight_ih = self._sigmoids_first(_weight(stack, f"weight_ih_{suffix}"))
        self._weight_hh = self._sigmoids_first(_weight(stack, f"weight_hh_{suffix}")).t().contiguous()
        self._bias = self._sigmoids_first(_weight(stack, f"bias_ih_{suffix}") + _weight(stack, f"bias_hh_{suffix}"))
        self.weight_bytes = self._weight_ih.nbytes + self._weight_hh.nbytes

    @staticmethod
    def _sigmoids_first(rows: Tensor) -> Tensor:
        """The candidate's rows to the end."""
        input_gate, forget_gate, candidate, output_gate = rows.chunk(4)
        return torch.cat([input_gate, forget_gate, output_gate, candidate])

    def run(self, inputs: Tensor, values: Values) -> tuple[Tensor, Values]:
        size = self._weight_hh.shape[0]
        gates_of_steps = linear(inputs, self._weight_ih, self._bias)
        outputs = inputs.new_empty(*inputs.shape[:2], size)
        h, c = values[0], values[1].clone()
        product, rounded_h = self._weight_hh.new_empty(len(h), 4 * size), self._weight_hh.new_empty(h.shape)
        for gates, output in zip(gates_of_steps.unbind(), outputs.unbind(), strict=True):
            torch.mm(rounded_h.copy_(h), self._weight_hh, out=product)
            gates += product
            sigmoids, candidate = gates[:, : 3 * size].sigmoid_(), gates[:, 3 * size :].tanh_()
            input_gate, forget_gate, output_gate = sigmoids.chunk(3, dim=1)
            c.mul_(forget_gate).addcmul_(input_gate, candidate)
            h = torch.mul(output_gate, torch.tanh(c, out=candidate), out=output)
        return outputs, (h, c)


class OneDnnLstm:
    """An LSTM layer by oneDNN, with weights in its own layout; where they are bfloat16, so is the state."""

    def __init__(self, stack: RecurrentStack, suffix: str) -> None:
        """Raises RuntimeError where torch or the processor has no such kernel."""
        self._hidden_size = stack.spec.hidden_size
        weight_ih, weight_hh = _weight(stack, f"weight_ih_{suffix}"), _weight(stack, f"weight_hh_{suffix}")
        self._type = weight_ih.dtype
        self._weights = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight(
            weight_ih, weight_hh, self._hidden_size, False, True, False, [16, 16, weight_ih.shape[1]]
        )
        self._biases = [_weight(stack, f"bias_{kind}_{suffix}").to(self._type) for kind in ("ih", "hh")]
        zero = torch.zeros(1, self._hidden_size)
        self.run(torch.zeros(1, 1, weight_ih.shape[1]), (zero, zero))

    def run(self, inputs: Tensor, values: Values) -> tuple[Tensor, Values]:
        outputs, h, c, _ = torch.ops.aten.mkldnn_rnn_layer(
            inputs.to(self._type), *self._weights, *self._biases, *(value.to(self._type) for value in values),
            False, [], LSTM_MODE, self._hidden_size, 1, True, False, False, False,
        )  # fmt: skip
        return outputs.float(), (h.view_as(values[0]).float(), c.view_as(values[1]).float())


class LargeLstm:
    """For a few sequences oneDNN reads the input's weights anew at each step; there step by step is better."""

    def __init__(self, few: LstmSteps, others: OneDnnLstm) -> None:
        self._few = few
        self._others = others

    def run(self, inputs: Tensor, values: Values) -> tuple[Tensor, Values]:
        layer = self._few if inputs.shape[1] in FEW else self._others
        return layer.run(inputs, values)


class LaneKernel:
    """Some steps of one or more layers on top of each other."""

    def __init__(self, stack: RecurrentStack, suffixes: Sequence[str]) -> None:
        layout = stack.spec.state_layout
        self._layers = [_layer(stack, suffix) for suffix in suffixes]
        self._values_per_layer = layout.values_per_layer
        self._hidden_size = layout.hidden_size
        self.row_size = len(suffixes) * layout.values_per_layer * layout.hidden_size

    def run(self, inputs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (steps, batch, width), rows (batch, row_size) -> (steps, batch, hidden), rows after the last step."""
        values = torch.split(rows, self._hidden_size, dim=1)
        new: list[Tensor] = []
        for i, layer in enumerate(self._layers):
            of_layer = values[i * self._values_per_layer : (i + 1) * self._values_per_layer]
            inputs, after = layer.run(inputs, tuple(value.contiguous() for value in of_layer))
            new += after
        return inputs, torch.cat(new, dim=1)


class SequenceNetwork:
    """A bidirectional layer is a stage of its own, as it needs both ends; layers in one direction are one stage.

    So is the decoder, if there is one, behind them.
    """

    def __init__(self, predictor: Predictor, model: ModelKey) -> None:
        self.model = model
        self._predictor = predictor
        spec, stack = predictor.network.spec, predictor.network.recurrent
        self.hidden_size = spec.hidden_size
        self.answers_about_mean = spec.readout == "mean"
        self.padding: NDArray[np.generic] = predictor.padding.numpy()
        self.stages = [[LaneKernel(stack, suffixes) for suffixes in lanes] for lanes in _stages(spec)]
        self.decoder = predictor.network if isinstance(predictor.network, EncoderDecoder) else None
        self.lanes = (*map(len, self.stages), *([1] if self.decoder else []))

    @torch.inference_mode()
    def read(self, sequence: NDArray[np.generic]) -> Floats:
        """(steps, features) or (steps,) -> what the first stage sees (steps + look_ahead, width)."""
        read: Floats = self._predictor.read(torch.from_numpy(sequence)).numpy()
        return read

    @torch.inference_mode()
    def read_on(self, sequence: NDArray[np.generic], last: Tensor | None) -> tuple[Floats, Tensor | None]:
        """The same for the next steps of a sequence in parts; `last` is what the steps before them gave, or None.

        Behind the last part belongs `padding`.
        """
        read, last = self._predictor.read_on(torch.from_numpy(sequence), last)
        return read.numpy(), last

    def about_steps(self, hidden: Floats) -> Floats:
        """(steps + look_ahead, …) that the last stage gave -> (steps, …), each about the step of that index."""
        return hidden[len(self.padding) :]

    @torch.inference_mode()
    def answer(self, hidden: Floats) -> Floats:
        """(steps, hidden * directions) of the last stage -> (steps, outputs), or (1, outputs) about the whole."""
        answer: Floats = self._predictor.answer(torch.from_numpy(hidden)).numpy()
        return answer


def _stages(spec: NetworkSpec) -> list[list[list[str]]]:
    """The names of the layers in each lane of each stage."""
    if spec.direction == "bidirectional":
        return [[[f"l{layer}"], [f"l{layer}_reverse"]] for layer in range(spec.layers)]
    return [[[f"l{layer}" for layer in range(spec.layers)]]]


def _layer(stack: RecurrentStack, suffix: str) -> LayerKernel:
    if stack.spec.cell != "lstm" or stack.spec.transition_layers > 1:
        return CellLayer(stack, suffix)
    steps = LstmSteps(stack, suffix)
    try:
        one_dnn = OneDnnLstm(stack, suffix)
    except (RuntimeError, AttributeError):
        return steps
    if steps.weight_bytes <= LARGE_BYTES:
        return one_dnn
    steps_s, one_dnn_s = _few_s(steps, stack, suffix), _few_s(one_dnn, stack, suffix)
    chosen = "step by step" if steps_s < one_dnn_s else "oneDNN"
    times_ms = 1_000 * steps_s, 1_000 * one_dnn_s
    log.debug("layer %s: %s for a few sequences; step by step %.2f ms, oneDNN %.2f ms", suffix, chosen, *times_ms)
    return LargeLstm(steps, one_dnn) if steps_s < one_dnn_s else one_dnn


@torch.inference_mode()
def _few_s(kernel: LayerKernel, stack: RecurrentStack, suffix: str) -> float:
    """What a tick of a few sequences takes on this processor; its cache decides which kernel is the best."""
    width = _weight(stack, f"weight_ih_{suffix}").shape[1]
    inputs = torch.zeros(TRIED_STEPS, TRIED_SEQUENCES, width)
    zero = torch.zeros(TRIED_SEQUENCES, stack.spec.hidden_size)
    times_s = []
    for _ in range(TRIES):
        start_s = time.perf_counter()
        kernel.run(inputs, (zero, zero))
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


def _weight(stack: RecurrentStack, name: str) -> Tensor:
    return stack.get_parameter(name).detach()
