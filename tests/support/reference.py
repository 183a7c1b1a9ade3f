"""What a bundle must answer, computed without `models`: by the equations in NumPy, and by plain `torch.nn`."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import nn

Array = NDArray[Any]
Weights = Mapping[str, Array]
State = list[tuple[Array, ...]]
"""Of each layer its (h,) or (h, c), each (hidden,)."""


def sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


class NumpyNetwork:
    """The equations, one step of one sequence at a time, in double precision."""

    def __init__(self, network: Mapping[str, Any], weights: Weights) -> None:
        self.network = network
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}

    def initial_state(self) -> State:
        values = 2 if self.network["cell"] == "lstm" else 1
        return [tuple(np.zeros(self.network["hidden_size"]) for _ in range(values)) for _ in range(self._layers)]

    def step(self, x: Array, state: State) -> tuple[Array, State]:
        """(features,) or a symbol's number -> (outputs,), the state after it."""
        signal, new_state = self._read(x), []
        for layer, values in enumerate(state):
            new_state.append(self._transition(signal, values, f"l{layer}"))
            signal = new_state[-1][0]
        return self._answer(signal), new_state

    def run(self, inputs: Array) -> Array:
        """(steps, …) -> (steps, outputs), or (1, outputs) where the network answers about the mean."""
        signals = [self._read(x) for x in inputs]
        for layer in range(self._layers):
            hidden = self._pass(signals, f"l{layer}")
            if self.network["direction"] == "bidirectional":
                backward = self._pass(signals[::-1], f"l{layer}_reverse")[::-1]
                hidden = [np.concatenate(pair) for pair in zip(hidden, backward, strict=True)]
            signals = hidden
        if self.network["readout"] == "mean":
            signals = [np.mean(signals, axis=0)]
        return np.stack([self._answer(signal) for signal in signals])

    @property
    def _layers(self) -> int:
        return int(self.network["layers"])

    def _pass(self, signals: list[Array], layer: str) -> list[Array]:
        values, hidden = self.initial_state()[0], []
        for signal in signals:
            values = self._transition(signal, values, layer)
            hidden.append(values[0])
        return hidden

    def _transition(self, x: Array, values: tuple[Array, ...], layer: str) -> tuple[Array, ...]:
        share = self._of(f"weight_ih_{layer}") @ x
        for depth in range(self.network["transition_layers"]):
            cell = layer if depth == 0 else f"{layer}_t{depth}"
            values = self._cell(share + self._of(f"bias_ih_{cell}"), values, cell)
            share = np.zeros_like(share)
        return values

    def _cell(self, from_input: Array, values: tuple[Array, ...], cell: str) -> tuple[Array, ...]:
        h = values[0]
        from_hidden = self._of(f"weight_hh_{cell}") @ h + self._of(f"bias_hh_{cell}")
        match self.network["cell"]:
            case "tanh":
                return (np.tanh(from_input + from_hidden),)
            case "relu":
                return (np.maximum(0.0, from_input + from_hidden),)
            case "gru":
                (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(from_input, 3), np.split(from_hidden, 3)
                z = sigmoid(z_x + z_h)
                return ((1.0 - z) * np.tanh(n_x + sigmoid(r_x + r_h) * n_h) + z * h,)
            case "lstm":
                i, f, g, o = np.split(from_input + from_hidden, 4)
                c = sigmoid(f) * values[1] + sigmoid(i) * np.tanh(g)
                return sigmoid(o) * np.tanh(c), c
        raise ValueError(self.network["cell"])

    def _of(self, name: str) -> Array:
        return self.weights[f"recurrent.{name}"]

    def _read(self, x: Array) -> Array:
        signal = self.weights["embedding.weight"][int(x)] if self.network["symbols"] else np.asarray(x, np.float64)
        return self._dense("input_block", len(self.network["input_layers"]), signal)

    def _answer(self, signal: Array) -> Array:
        signal = self._dense("output_block", len(self.network["output_layers"]), signal)
        return self.weights["output.weight"] @ signal + self.weights["output.bias"]

    def _dense(self, block: str, layers: int, signal: Array) -> Array:
        for i in range(0, 2 * layers, 2):  # between the linear layers stand those with ReLU
            signal = np.maximum(0.0, self.weights[f"{block}.{i}.weight"] @ signal + self.weights[f"{block}.{i}.bias"])
        return signal


TORCH_MODULES = {"tanh": nn.RNN, "relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def torch_module(
    cell: str, width: int, hidden: int, *, layers: int = 1, bidirectional: bool = False
) -> nn.RNN | nn.GRU | nn.LSTM:
    """The `torch.nn` module of that cell, batch first."""
    extra: dict[str, Any] = {"nonlinearity": cell} if cell in ("tanh", "relu") else {}
    module: nn.RNN | nn.GRU | nn.LSTM = TORCH_MODULES[cell](
        width, hidden, layers, batch_first=True, bidirectional=bidirectional, **extra
    )
    return module


@torch.inference_mode()
def run_in_torch(network: Mapping[str, Any], weights: Weights, inputs: Array) -> Array:
    """One whole sequence through `torch.nn`; only where transition_layers is 1. Shapes as in `NumpyNetwork.run`."""
    of = _tensors(weights)
    signal = _hidden_in_torch(network, of, inputs)
    if network["readout"] == "mean":
        signal = signal.mean(dim=0, keepdim=True)
    signal = _dense(of, "output_block", len(network["output_layers"]), signal)
    outputs: Array = nn.functional.linear(signal, of["output.weight"], of["output.bias"]).numpy()
    return outputs


def _tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}


def _hidden_in_torch(network: Mapping[str, Any], of: dict[str, torch.Tensor], inputs: Array) -> torch.Tensor:
    """What the last recurrent layer gives: (steps, hidden * directions)."""
    signal = torch.from_numpy(np.array(inputs))
    if network["symbols"]:
        signal = of["embedding.weight"][signal]
    signal = _dense(of, "input_block", len(network["input_layers"]), signal)
    module = torch_module(
        network["cell"],
        signal.shape[-1],
        network["hidden_size"],
        layers=network["layers"],
        bidirectional=network["direction"] == "bidirectional",
    )
    recurrent = {name.removeprefix("recurrent."): w for name, w in of.items() if name.startswith("recurrent.")}
    module.load_state_dict(recurrent)
    hidden: torch.Tensor = module(signal.unsqueeze(0))[0].squeeze(0)
    return hidden


def _dense(of: Mapping[str, torch.Tensor], block: str, layers: int, signal: torch.Tensor) -> torch.Tensor:
    for i in range(0, 2 * layers, 2):
        signal = torch.relu(nn.functional.linear(signal, of[f"{block}.{i}.weight"], of[f"{block}.{i}.bias"]))
    return signal


class Written(NamedTuple):
    """The numbers of an output's labels, and the score of it."""

    labels: tuple[int, ...]
    score: float


def _next_label(
    network: Mapping[str, Any], of: dict[str, torch.Tensor], memory: torch.Tensor, labels: tuple[int, ...]
) -> torch.Tensor:
    """Log probabilities (outputs,) of what comes behind these labels; memory (steps, width)."""
    size, width = network["hidden_size"], memory.shape[1]
    ends = torch.cat([memory[-1, :size], memory[0, size:]])
    h = torch.tanh(nn.functional.linear(ends, of["bridge.weight"], of["bridge.bias"])).view(1, 1, -1)
    module = torch_module(network["cell"], network["decoder"]["embedding_size"], width)
    module.load_state_dict({name.removeprefix("decoder."): w for name, w in of.items() if name.startswith("decoder.")})
    seen = of["label_embedding.weight"][torch.tensor([0, *labels])].unsqueeze(0)
    start = (h, torch.zeros_like(h)) if network["cell"] == "lstm" else h
    state: torch.Tensor = module(seen, start)[0][0, -1]
    if network["decoder"]["attention"]:
        read = (memory @ state).softmax(dim=0) @ memory
        both = torch.cat([read, state])
        state = torch.tanh(nn.functional.linear(both, of["combine.weight"], of["combine.bias"]))
    state = _dense(of, "output_block", len(network["output_layers"]), state)
    return nn.functional.linear(state, of["output.weight"], of["output.bias"]).log_softmax(dim=0)


class Reference:
    """A bundle's folder, read by itself."""

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        kept = load_file(folder / "weights.safetensors")  # float32 or float16, of which nothing is lost
        self.weights: dict[str, Array] = {name: weights.astype(np.float32) for name, weights in kept.items()}

    def predict(self, values: Array | str) -> Array:
        """(steps, features) or a text -> (steps, outputs), or (1, outputs) where the network answers about the mean."""
        network, look_ahead = self.manifest["network"], self.manifest["look_ahead"]
        inputs = self._inputs(values)
        inputs = np.concatenate([inputs, self._padding(look_ahead)]) if look_ahead else inputs
        if network["transition_layers"] == 1:
            return run_in_torch(network, self.weights, inputs)[look_ahead:]
        return NumpyNetwork(network, self.weights).run(inputs)[look_ahead:]

    @torch.inference_mode()
    def write(self, values: Array | str, *, beam_width: int, length_penalty: float, max_labels: int) -> list[Written]:
        """Hypotheses of an encoder-decoder, the best first, by a search that computes every path from its beginning."""
        network, of = self.manifest["network"], _tensors(self.weights)
        memory = _hidden_in_torch(network, of, self._inputs(values))
        paths, ended = [Written((), 0.0)], list[Written]()
        while len(ended) < beam_width:
            following = list[Written]()
            for labels, score in paths:
                log_probabilities = _next_label(network, of, memory, labels)
                following += [Written((*labels, i), score + p) for i, p in enumerate(log_probabilities.tolist())]
            following.sort(key=lambda path: -path.score)
            for labels, score in following[:beam_width]:
                if labels[-1] == 0:
                    ended.append(Written(labels[:-1], score / len(labels) ** length_penalty))
            paths = [path for path in following if path.labels[-1] != 0][:beam_width]
            if len(paths[0].labels) == max_labels:
                ended += [Written(labels, score / len(labels) ** length_penalty) for labels, score in paths]
                break
        return sorted(ended, key=lambda written: -written.score)

    def _padding(self, steps: int) -> Array:
        """What stands behind the end, as the network sees it: (steps, features) or (steps,)."""
        spec = self.manifest["input"]
        if spec["kind"] == "text":
            return np.full(steps, spec["symbols"].index(spec["padding"]))
        return np.zeros((steps, len(spec["mean"])), np.float32)

    def _inputs(self, values: Array | str) -> Array:
        spec = self.manifest["input"]
        if isinstance(values, str):
            steps = values.split() if spec.get("unit") == "word" else list(values)
            return np.array([self._symbol_number(step) for step in steps])
        filled = np.array(values, np.float32)
        for step, feature in np.argwhere(np.isnan(filled)):  # in the order of the steps
            held = spec["missing_values"] == "hold_last" and step > 0
            filled[step, feature] = filled[step - 1, feature] if held else spec["mean"][feature]
        return self.normalised(filled)

    def _symbol_number(self, step: str) -> int:
        spec = self.manifest["input"]
        forms = [step, step.casefold(), step.casefold().strip(string.punctuation)] if spec.get("fold_case") else [step]
        found = [form for form in forms if form in spec["symbols"]]
        return int(spec["symbols"].index(found[0] if found else spec["unknown"]))

    def normalised(self, values: Array) -> Array:
        """(…, features) -> what the network sees."""
        spec = self.manifest["input"]
        return np.asarray((values - np.array(spec["mean"], np.float32)) / np.array(spec["std"], np.float32))


class StepReference:
    """One step of a session of a bundle, from any row: the state, then what missing values hold, if anything."""

    def __init__(self, folder: Path) -> None:
        self._bundle = Reference(folder)
        self._network = NumpyNetwork(self._bundle.manifest["network"], self._bundle.weights)

    def step(self, x: Array, row: Array) -> tuple[Array, Array]:
        """(features,) or a symbol's number, row (row_size,) -> (outputs,), the row after it."""
        network = self._bundle.manifest["network"]
        shape = network["layers"], 2 if network["cell"] == "lstm" else 1, network["hidden_size"]
        values, held = np.split(np.asarray(row, np.float64), [int(np.prod(shape))])
        if not network["symbols"]:
            x = self._bundle.normalised(x)
            x = np.where(np.isnan(x), held if len(held) else 0.0, x)
        output, state = self._network.step(x, [tuple(layer) for layer in values.reshape(shape)])
        return output, np.concatenate([*(value for layer in state for value in layer), x if len(held) else held])


def assert_close(found: Array, wanted: Array, tolerance: float = 1e-5) -> None:
    """Within tolerance · max(1, |wanted|)."""
    assert found.shape == wanted.shape
    np.testing.assert_array_less(np.abs(found - wanted), tolerance * np.maximum(1.0, np.abs(wanted)))
