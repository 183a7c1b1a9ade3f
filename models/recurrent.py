"""Recurrent networks by the field's equations: cells, stacked layers, direction, deep transitions, head.

A network has three blocks, and each may be deep (Pascanu et al., "How to Construct Deep Recurrent
Neural Networks", 2013):

* input-to-hidden: an optional embedding of symbols, then `input_layers` with ReLU, then the cell's `weight_ih`;
* hidden-to-hidden: `layers` stacked recurrent layers, each passing `transition_layers` cells in a row within
  one step, the first of which alone sees the input (Barone et al., "Deep Architectures for Neural Machine
  Translation", 2017; for the tanh cell this is Pascanu's deep transition);
* hidden-to-output: `output_layers` with ReLU, then one linear layer.

Parameters of the recurrent layers have the names, shapes and gate order of `torch.nn.RNN`, `GRU` and `LSTM`,
so the state_dict of one of those loads into `RecurrentNetwork.recurrent` unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional

from models.state import StateLayout, initial_state, pack_state, unpack_state

Cell = Literal["tanh", "relu", "gru", "lstm"]
Direction = Literal["forward", "bidirectional"]
Readout = Literal["each_step", "mean"]

GATES: dict[Cell, int] = {"tanh": 1, "relu": 1, "gru": 3, "lstm": 4}
"""Rows of a cell's weights, in units of the hidden size."""


class DecoderSpec(BaseModel):
    """What writes the output of an encoder-decoder; see models/seq2seq.py."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embedding_size: PositiveInt = Field(description="width of a label's vector")
    attention: bool = Field(True, description="each label looks at all steps of the input, not at their end alone")
    max_labels: int = Field(ge=1, le=10_000, description="of one output")


class NetworkSpec(BaseModel):
    """Everything that decides the shape of a network's weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cell: Cell
    direction: Direction = "forward"
    features: PositiveInt | None = Field(None, description="width of a numeric step")
    symbols: PositiveInt | None = Field(None, description="size of the alphabet of a symbolic step")
    embedding_size: PositiveInt | None = Field(None, description="width of a symbol's vector")
    hidden_size: PositiveInt
    layers: int = Field(1, ge=1, le=16, description="stacked recurrent layers")
    input_layers: tuple[PositiveInt, ...] = Field((), description="sizes of the layers before the recurrence")
    transition_layers: int = Field(1, ge=1, le=16, description="cells in a row within one step of one layer")
    output_layers: tuple[PositiveInt, ...] = Field((), description="sizes of the hidden layers of the head")
    outputs: PositiveInt
    readout: Readout = Field("each_step", description="the head sees each step, or the mean over the steps")
    decoder: DecoderSpec | None = Field(None, description="writes an output of another length; label 0 means its end")

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> Self:
        if (self.features is None) == (self.symbols is None):
            raise ValueError("give either features or symbols")
        if (self.symbols is None) != (self.embedding_size is None):
            raise ValueError("embedding_size goes with symbols")
        if self.decoder is not None and self.readout != "each_step":
            raise ValueError("a decoder goes with the readout each_step")
        return self

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    @property
    def streamable(self) -> bool:
        return self.why_not_streamable is None

    @property
    def why_not_streamable(self) -> str | None:
        """Why no answer can be given before the sequence ends; None if one can."""
        if self.decoder is not None:
            return "an encoder-decoder reads the whole sequence before it writes its output"
        if self.direction == "bidirectional":
            return "a bidirectional network reads the sequence from both ends, so it needs the whole of it"
        if self.readout != "each_step":
            return "the network answers about the mean over all steps, so it needs the whole sequence"
        return None

    @property
    def state_layout(self) -> StateLayout:
        """The state of one session of a forward network: h, and for LSTM c, of each layer."""
        values_per_layer = 2 if self.cell == "lstm" else 1
        return StateLayout(layers=self.layers, values_per_layer=values_per_layer, hidden_size=self.hidden_size)


# A cell takes the input's share of the gates (batch, gates * hidden), the values (h,) or (h, c), each
# (batch, hidden), and the hidden weights; it gives the new values, the first of which is its output.
Values = tuple[Tensor, ...]
CellStep = Callable[[Tensor, Values, Tensor, Tensor], Values]


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`functional.linear` from float32 to float32; only the product is bfloat16 where the weight is."""
    if weight.dtype == torch.bfloat16:
        return functional.linear(inputs.bfloat16(), weight).float() + bias
    return functional.linear(inputs, weight, bias)


def tanh_step(input_gates: Tensor, values: Values, weight_hh: Tensor, bias_hh: Tensor) -> Values:
    """a⟨t⟩ = tanh(Waa a⟨t−1⟩ + Wax x⟨t⟩ + ba): the vanilla cell."""
    return (torch.tanh(input_gates + linear(values[0], weight_hh, bias_hh)),)


def relu_step(input_gates: Tensor, values: Values, weight_hh: Tensor, bias_hh: Tensor) -> Values:
    """a⟨t⟩ = max(0, Waa a⟨t−1⟩ + Wax x⟨t⟩ + ba)."""
    return (torch.relu(input_gates + linear(values[0], weight_hh, bias_hh)),)


def gru_step(input_gates: Tensor, values: Values, weight_hh: Tensor, bias_hh: Tensor) -> Values:
    """Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014.

    The reset gate acts after the hidden product, as in `torch.nn.GRU`.
    """
    (h,) = values
    hidden_gates = linear(h, weight_hh, bias_hh)
    input_reset, input_update, input_new = input_gates.chunk(3, dim=-1)
    hidden_reset, hidden_update, hidden_new = hidden_gates.chunk(3, dim=-1)
    reset = torch.sigmoid(input_reset + hidden_reset)
    update = torch.sigmoid(input_update + hidden_update)
    new = torch.tanh(input_new + reset * hidden_new)
    return (new + update * (h - new),)


def lstm_step(input_gates: Tensor, values: Values, weight_hh: Tensor, bias_hh: Tensor) -> Values:
    """Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, with the forget gate of Gers et al., 2000."""
    return lstm_values(input_gates + linear(values[0], weight_hh, bias_hh), values[1])


def lstm_values(gates: Tensor, c: Tensor) -> Values:
    """What the gates make of the cell: the new (h, c)."""
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)
    c = torch.sigmoid(forget_gate) * c + torch.sigmoid(input_gate) * torch.tanh(candidate)
    return torch.sigmoid(output_gate) * torch.tanh(c), c


CELL_STEPS: dict[Cell, CellStep] = {"tanh": tanh_step, "relu": relu_step, "gru": gru_step, "lstm": lstm_step}


class RecurrentStack(nn.Module):
    """The stacked recurrent layers of a network.

    A layer's first cell is named as in torch (`weight_ih_l0`, with `_reverse` for the second direction); the
    further cells of a deep transition, which see no input and so have no `weight_ih`, add `_t1`, `_t2`, ….
    """

    def __init__(self, spec: NetworkSpec, input_size: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.dropout = nn.Dropout(dropout)
        self._cell_step = CELL_STEPS[spec.cell]
        gate_rows, hidden = GATES[spec.cell] * spec.hidden_size, spec.hidden_size
        for layer in range(spec.layers):
            width = input_size if layer == 0 else hidden * spec.directions
            for suffix in self._suffixes(layer):
                self._add(f"weight_ih_{suffix}", gate_rows, width)
                for cell in self._cells_of(suffix):
                    self._add(f"weight_hh_{cell}", gate_rows, hidden)
                    self._add(f"bias_ih_{cell}", gate_rows)
                    self._add(f"bias_hh_{cell}", gate_rows)

    def _add(self, name: str, *shape: int) -> None:
        bound = self.spec.hidden_size**-0.5
        self.register_parameter(name, nn.Parameter(torch.empty(*shape).uniform_(-bound, bound)))

    def _suffixes(self, layer: int) -> Iterator[str]:
        yield f"l{layer}"
        if self.spec.direction == "bidirectional":
            yield f"l{layer}_reverse"

    def _cells_of(self, suffix: str) -> Iterator[str]:
        yield suffix
        for depth in range(1, self.spec.transition_layers):
            yield f"{suffix}_t{depth}"

    def _input_gates(self, inputs: Tensor, suffix: str) -> Tensor:
        """(..., width) -> (..., gates * hidden): the input's share, for one step or all steps at once."""
        weight, bias = self.get_parameter(f"weight_ih_{suffix}"), self.get_parameter(f"bias_ih_{suffix}")
        return linear(inputs, weight, bias)

    def _step_layer(self, input_gates: Tensor, values: Values, suffix: str) -> Values:
        """One step of one layer in one direction, through all cells of its transition."""
        for cell in self._cells_of(suffix):
            gates = input_gates if cell == suffix else self.get_parameter(f"bias_ih_{cell}")
            weight_hh, bias_hh = self.get_parameter(f"weight_hh_{cell}"), self.get_parameter(f"bias_hh_{cell}")
            values = self._cell_step(gates, values, weight_hh, bias_hh)
        return values

    def forward(self, inputs: Tensor, lengths: Tensor, state: list[Values]) -> tuple[Tensor, list[Values]]:
        """Whole sequences: (batch, steps, width) -> (batch, steps, hidden * directions), values after the end.

        `lengths` (batch,) says how many steps of each row count; what lies behind them changes nothing.
        The final values are those of the forward direction. The backward direction starts at zero.
        """
        final_state = []
        for layer, values in enumerate(state):
            if layer > 0:
                inputs = self.dropout(inputs)
            hidden, values = self._run(inputs, lengths, values, f"l{layer}")
            final_state.append(values)
            if self.spec.direction == "bidirectional":
                start = tuple(torch.zeros_like(value) for value in values)
                backward, _ = self._run(reverse(inputs, lengths), lengths, start, f"l{layer}_reverse")
                hidden = torch.cat([hidden, reverse(backward, lengths)], dim=-1)
            inputs = hidden
        return inputs, final_state

    def _run(self, inputs: Tensor, lengths: Tensor, values: Values, suffix: str) -> tuple[Tensor, Values]:
        """One layer in one direction; all input products are taken at once, the hidden ones step by step."""
        input_gates = self._input_gates(inputs, suffix)
        outputs = []
        shortest = int(lengths.min())
        for t in range(inputs.shape[1]):
            new = self._step_layer(input_gates[:, t], values, suffix)
            if t >= shortest:  # a row that has ended keeps its values
                live = (t < lengths).unsqueeze(-1)
                new = tuple(torch.where(live, after, before) for after, before in zip(new, values, strict=True))
            values = new
            outputs.append(values[0])
        return torch.stack(outputs, dim=1), values


def reverse(sequences: Tensor, lengths: Tensor) -> Tensor:
    """Turn each row of (batch, steps, width) around within its own length; what lies behind stays put."""
    t = torch.arange(sequences.shape[1], device=sequences.device)
    mirrored = lengths.unsqueeze(1) - 1 - t
    index = torch.where(mirrored >= 0, mirrored, t)
    return sequences.gather(1, index.unsqueeze(-1).expand_as(sequences))


class Linear(nn.Linear):
    """A layer whose weight may be bfloat16."""

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight, self.bias)


def feed_forward(width: int, sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of the given sizes, each with ReLU behind it."""
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers)


class RecurrentNetwork(nn.Module):
    """A network of the three blocks. Inputs: (…, features) float32, or symbol numbers (…,) int64."""

    def __init__(
        self, spec: NetworkSpec, *, dropout: float = 0.0, stack: type[RecurrentStack] = RecurrentStack
    ) -> None:
        """`dropout` acts in training only: before each stacked layer but the first, and before the head.

        `stack` computes the recurrent layers.
        """
        super().__init__()
        self.spec = spec
        width = spec.features or spec.embedding_size or 0
        self.embedding = nn.Embedding(spec.symbols, width) if spec.symbols else None
        self.input_block = feed_forward(width, spec.input_layers)
        self.recurrent = stack(spec, (width, *spec.input_layers)[-1], dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        hidden = spec.hidden_size * spec.directions
        self.output_block = feed_forward(hidden, spec.output_layers)
        self.output = nn.Linear((hidden, *spec.output_layers)[-1], spec.outputs)

    def to_bfloat16(self) -> None:
        """Round the weights of all matrix products but the last, which would round the answers themselves."""
        for block in (self.input_block, self.recurrent, self.output_block):
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter.data = parameter.data.bfloat16()

    def read(self, inputs: Tensor) -> Tensor:
        """(…, features) or (…,) -> what the first recurrent layer sees (…, width)."""
        vectors: Tensor = inputs if self.embedding is None else self.embedding(inputs)
        read: Tensor = self.input_block(vectors)
        return read

    def answer(self, hidden: Tensor) -> Tensor:
        """(…, hidden * directions) of the last recurrent layer -> (…, outputs)."""
        outputs: Tensor = self.output(self.output_block(self.dropout(hidden)))
        return outputs

    def forward(self, inputs: Tensor, lengths: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whole sequences of different lengths, padded to the longest.

        inputs (batch, steps, features) or (batch, steps), lengths (batch,) of at least 1
        -> outputs (batch, steps, outputs), or (batch, outputs) where the readout is the mean,
        and the state of the forward direction after each row's last step (batch, state_size).
        `state` is where the forward direction begins; the initial state is zero.
        """
        if state is None:
            state = initial_state(inputs.shape[0], self.spec.state_layout)
        start = unpack_state(state, self.spec.state_layout)
        hidden, values = self.recurrent(self.read(inputs), lengths, start)
        if self.spec.readout == "mean":
            live = torch.arange(hidden.shape[1], device=hidden.device) < lengths.unsqueeze(1)
            hidden = (hidden * live.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(1)
        return self.answer(hidden), pack_state(values)
