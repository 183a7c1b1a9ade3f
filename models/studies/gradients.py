"""Vanishing gradients: how much of ∂L_T/∂a⟨T⟩ reaches a⟨T−d⟩, by cell and by how its weights start.

Why it vanishes or explodes: Hochreiter, "Untersuchungen zu dynamischen neuronalen Netzen", 1991; Bengio, Simard and
Frasconi, "Learning long-term dependencies with gradient descent is difficult", 1994. The starts: torch's own;
orthogonal (Saxe et al. 2014); the identity with ReLU (Le, Jaitly and Hinton, "A Simple Way to Initialize Recurrent
Networks of Rectified Linear Units", 2015); a forget bias of 1 (Jozefowicz, Zaremba and Sutskever 2015); chrono (Tallec
and Ollivier, "Can recurrent neural networks warp time?", 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from models.markdown import table
from models.recurrent import CELL_STEPS, Cell, NetworkSpec, RecurrentStack, Values, linear
from models.studies.variants import STUDENT_95

UNITS, SEQUENCES, SEEDS = 128, 8, 3
LENGTHS = (1_000, 10_000)
DISTANCES = (10, 100, 500, 999, 9_999)

Prepare = Callable[[RecurrentStack, int], None]
"""Changes the weights of a fresh layer, given how long its sequences are."""
Floats = NDArray[np.float64]


def as_torch_has_it(_stack: RecurrentStack, _steps: int) -> None:
    """Uniform, within 1/√units."""


def orthogonal(stack: RecurrentStack, _steps: int) -> None:
    """Waa neither shrinks nor stretches anything."""
    torch.nn.init.orthogonal_(stack.get_parameter("weight_hh_l0"))


def identity(stack: RecurrentStack, _steps: int) -> None:
    """Waa passes all on, inputs are small, no bias."""
    with torch.no_grad():
        stack.get_parameter("weight_hh_l0").copy_(torch.eye(stack.spec.hidden_size))
        stack.get_parameter("weight_ih_l0").normal_(0, 0.001)
        stack.get_parameter("bias_ih_l0").zero_()
        stack.get_parameter("bias_hh_l0").zero_()


def forget_bias_of_one(stack: RecurrentStack, _steps: int) -> None:
    """An LSTM's forget gate is at 0.73 at first."""
    _set_gate(stack, 1, torch.ones(stack.spec.hidden_size))


def chrono(stack: RecurrentStack, steps: int) -> None:
    """The gate that keeps has the bias log U(1, T − 1), an LSTM's input gate minus it: memories last 1 to T steps."""
    keeps = torch.log(torch.empty(stack.spec.hidden_size).uniform_(1, steps - 1))
    _set_gate(stack, 1, keeps)
    if stack.spec.cell == "lstm":
        _set_gate(stack, 0, -keeps)


def _set_gate(stack: RecurrentStack, gate: int, bias: Tensor) -> None:
    with torch.no_grad():
        rows = slice(gate * len(bias), (gate + 1) * len(bias))
        stack.get_parameter("bias_ih_l0")[rows] = bias
        stack.get_parameter("bias_hh_l0")[rows] = 0


STARTS: dict[str, tuple[Cell, Prepare]] = {
    "tanh": ("tanh", as_torch_has_it),
    "tanh, orthogonal": ("tanh", orthogonal),
    "ReLU, identity": ("relu", identity),
    "GRU": ("gru", as_torch_has_it),
    "LSTM": ("lstm", as_torch_has_it),
    "LSTM, forget bias 1": ("lstm", forget_bias_of_one),
    "GRU, chrono": ("gru", chrono),
    "LSTM, chrono": ("lstm", chrono),
}


def layer(name: str, steps: int, seed: int, *, features: int = 1, units: int = UNITS) -> RecurrentStack:
    """One layer with such a start."""
    cell, prepare = STARTS[name]
    torch.manual_seed(seed)
    stack = RecurrentStack(NetworkSpec(cell=cell, features=features, hidden_size=units, outputs=1), features)
    prepare(stack, steps)
    return stack


def gradient_norms(stack: RecurrentStack, inputs: Tensor) -> Floats:
    """‖∂L_T/∂state⟨T−d⟩‖ for d = 0 … T − 1, the mean over the sequences of inputs (T, sequences, features); (T,).

    L_T depends on a⟨T⟩ by a random direction. By back-propagation through time, one step at a time: the gradient before
    a step is that behind it times the step's Jacobian. The state of an LSTM is h and c.
    """
    names = ("weight_ih_l0", "bias_ih_l0", "weight_hh_l0", "bias_hh_l0")
    weight_ih, bias_ih, weight_hh, bias_hh = (stack.get_parameter(name).detach() for name in names)
    step = CELL_STEPS[stack.spec.cell]
    gates = linear(inputs, weight_ih, bias_ih)
    count, shape = stack.spec.state_layout.values_per_layer, (inputs.shape[1], stack.spec.hidden_size)
    states: list[Values] = [tuple(torch.zeros(shape) for _ in range(count))]
    for own in gates:
        states.append(step(own, states[-1], weight_hh, bias_hh))
    direction = torch.nn.functional.normalize(torch.randn(shape), dim=1)
    behind: Values = (direction, *(torch.zeros_like(direction) for _ in range(count - 1)))
    norms = []
    for own, before in zip(gates.flip(0), reversed(states[:-1]), strict=True):
        norms.append(float(torch.cat(behind, dim=1).double().norm(dim=1).mean()))
        leaves = tuple(value.clone().requires_grad_() for value in before)
        behind = torch.autograd.grad(step(own, leaves, weight_hh, bias_hh), leaves, behind)
    return np.array(norms)


def relative_reach(norms: Floats) -> Floats:
    """Relative to that at distance 1; 0 where float32 holds no more than the last of its digits."""
    return np.where(norms < np.finfo(np.float32).tiny, 0.0, norms / norms[1])


def measure(lengths: Sequence[int], seed: int) -> dict[int, dict[str, Floats]]:
    """By length and start: the norms relative to that at distance 1, (SEEDS, steps)."""
    runs = [(steps, name, seed + i) for steps in lengths for name in STARTS for i in range(SEEDS)]
    found: dict[int, dict[str, list[Floats]]] = {steps: {name: [] for name in STARTS} for steps in lengths}
    for steps, name, own in track(runs, "gradients", console=Console(stderr=True)):
        norms = gradient_norms(layer(name, steps, own), torch.rand(steps, SEQUENCES, 1))
        found[steps][name].append(relative_reach(norms))
    return {steps: {name: np.stack(rows) for name, rows in by.items()} for steps, by in found.items()}


def compare(folder: Path, seed: int) -> Path:
    """Measure, and write gradients.md and gradients.png."""
    relative = measure(LENGTHS, seed)
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "gradients.png", relative)
    page = folder / "gradients.md"
    page.write_text(describe(relative, seed))
    return page


def draw(path: Path, relative: Mapping[int, Mapping[str, Floats]]) -> None:
    """A plot for each length; a line for each start, and its interval over the seeds as a band."""
    figure = Figure(figsize=(5.2 * len(relative), 4), layout="constrained")
    plots = figure.subplots(1, len(relative), squeeze=False)[0]
    for axes, (steps, by_name) in zip(plots, relative.items(), strict=True):
        for name, rows in by_name.items():
            shown = np.where(rows > 0, rows, np.nan)[:, 1:]  # what has underflowed is not drawn
            distances = np.arange(1, steps)
            mean, low, high = interval(shown)
            dashes = "--" if name == "LSTM, chrono" else "-"  # for it lies upon the GRU's
            (line,) = axes.plot(distances, mean, dashes, label=name)
            axes.fill_between(distances, low, high, color=line.get_color(), alpha=0.2)
        axes.set(xscale="log", yscale="log", ylim=(1e-20, 10), xlabel="distance T − t, steps", title=f"T = {steps:,}")
        axes.set_ylabel("‖∂L_T/∂a⟨t⟩‖, relative to distance 1")
        axes.grid(alpha=0.3)
    plots[-1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def describe(relative: Mapping[int, Mapping[str, Floats]], seed: int) -> str:
    """The page in Markdown."""
    parts = [
        "# How far gradients reach, by cell and by start",
        f"`python -m models compare gradients --seed {seed}`: one layer of {UNITS} units with random weights, "
        f"{SEQUENCES} sequences of random numbers in [0, 1]. The norm of the gradient of the loss at the last step T "
        "with respect to the state d steps before, relative to that at d = 1: geometric mean over "
        f"{SEEDS} seeds, and Student's 95 % interval of its logarithm. 0 means that float32 cannot hold it any more.",
        "![gradients](gradients.png)",
    ]
    for steps, by_name in relative.items():
        distances = [d for d in DISTANCES if d < steps]
        rows = [[name, *(_cell(values[:, d]) for d in distances)] for name, values in by_name.items()]
        parts += [f"## T = {steps:,}", table(["start", *(f"d = {d:,}" for d in distances)], rows)]
    return "\n\n".join(parts) + "\n"


def _cell(values: Floats) -> str:
    if values.min() <= 0:
        return "0" if values.max() <= 0 else f"0 to {values.max():.2g}"
    mean, low, high = (float(end[0]) for end in interval(values[:, None]))
    return f"{mean:.2g} ({low:.2g} – {high:.2g})"


def interval(rows: Floats) -> tuple[Floats, Floats, Floats]:
    """(seeds, n), above 0 or NaN -> each (n,): the geometric mean, and the ends of its interval."""
    logs = np.log(rows)
    mean, half = logs.mean(axis=0), STUDENT_95 * logs.std(axis=0, ddof=1) / len(rows) ** 0.5
    return np.exp(mean), np.exp(mean - half), np.exp(mean + half)
