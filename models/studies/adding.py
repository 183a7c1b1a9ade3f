"""The adding problem: which layers learn to keep two numbers, and how far their gradients reach afterwards.

Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997: each step has a random number and a mark; two steps are
marked, and the sum of their numbers is asked for at the end. Who always says 1 has a squared error of 1/6.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from models.markdown import table
from models.recurrent import Cell
from models.studies.gradients import SEEDS, SEQUENCES, Floats, gradient_norms, layer, relative_reach
from models.studies.variants import spread_of

STARTS_BY_STEPS = {
    200: ("tanh", "ReLU, identity", "GRU", "LSTM", "GRU, chrono", "LSTM, chrono"),
    1_000: ("GRU, chrono",),
}
UNITS, UPDATES, BATCH, CLIP_NORM = 64, 1_000, 32, 1.0
LEARNING_RATES: dict[Cell, float] = {"tanh": 1e-2, "relu": 1e-4, "gru": 1e-2, "lstm": 1e-2}  # at 1e-2 ReLU overflows
CHECK_EVERY, HELD_OUT, HELD_OUT_SEED = 50, 512, 10_000
SOLVED, OF_SAYING_ONE = 0.01, 1 / 6


class Job(NamedTuple):
    """One training."""

    name: str
    steps: int
    seed: int
    updates: int


class Learned(NamedTuple):
    """What came of it."""

    errors: list[float]  # on held-out sequences, after each CHECK_EVERY updates until it is solved
    reach: Floats  # (steps,) of the gradient, relative to that at distance 1

    @property
    def solved_after(self) -> int | None:
        """How many updates it took; None if it was not solved."""
        return len(self.errors) * CHECK_EVERY if self.errors[-1] < SOLVED else None


def problem(steps: int, sequences: int) -> tuple[Tensor, Tensor]:
    """(steps, sequences, 2): numbers in [0, 1], and two marks, one in each half; and the sums (sequences,)."""
    numbers, marks = torch.rand(steps, sequences), torch.zeros(steps, sequences)
    half, each = steps // 2, torch.arange(sequences)
    marks[torch.randint(half, (sequences,)), each] = 1
    marks[torch.randint(half, steps, (sequences,)), each] = 1
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(dim=0)


class Adder(nn.Module):
    """One of torch's own layers, which are faster to train, with our weights; it answers after the last step."""

    def __init__(self, cell: Cell, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layer: nn.RNNBase
        if cell == "lstm":
            self.layer = nn.LSTM(2, UNITS)
        elif cell == "gru":
            self.layer = nn.GRU(2, UNITS)
        else:
            self.layer = nn.RNN(2, UNITS, nonlinearity=cell)
        self.layer.load_state_dict(weights)
        self.head = nn.Linear(UNITS, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(steps, sequences, 2) -> (sequences,)."""
        hidden, _ = self.layer(inputs)
        answers: Tensor = self.head(hidden[-1])
        return answers.squeeze(1)


def learn(job: Job) -> Learned:
    """Train until it is solved, or for all updates."""
    torch.set_num_threads(1)
    torch.manual_seed(HELD_OUT_SEED)
    held_out, sums = problem(job.steps, HELD_OUT)
    stack = layer(job.name, job.steps, job.seed, features=2, units=UNITS)
    adder = Adder(stack.spec.cell, stack.state_dict())
    optimiser = torch.optim.Adam(adder.parameters(), lr=LEARNING_RATES[stack.spec.cell])
    errors: list[float] = []
    for update in range(1, job.updates + 1):
        inputs, wanted = problem(job.steps, BATCH)
        loss = nn.functional.mse_loss(adder(inputs), wanted)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(adder.parameters(), CLIP_NORM)
        optimiser.step()
        if update % CHECK_EVERY == 0:
            with torch.inference_mode():
                errors.append(float(nn.functional.mse_loss(adder(held_out), sums)))
            if not errors[-1] >= SOLVED:  # also where the weights have overflowed
                break
    stack.load_state_dict(adder.layer.state_dict())
    return Learned(errors, relative_reach(gradient_norms(stack, held_out[:, :SEQUENCES])))


Results = Mapping[int, Mapping[str, Sequence[Learned]]]
"""By steps and start, one for each seed."""


def measure(starts_by_steps: Mapping[int, Sequence[str]], updates: int, seed: int) -> Results:
    """Two trainings at a time, the longest first."""
    jobs = [
        Job(name, steps, seed + i, updates)
        for steps in sorted(starts_by_steps, reverse=True)
        for name in starts_by_steps[steps]
        for i in range(SEEDS)
    ]
    found: dict[int, dict[str, list[Learned]]] = {
        steps: {name: [] for name in names} for steps, names in starts_by_steps.items()
    }
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = track(pool.map(learn, jobs), "adding problem", total=len(jobs), console=Console(stderr=True))
        for job, learned in zip(jobs, done, strict=True):
            found[job.steps][job.name].append(learned)
    return found


def compare(folder: Path, seed: int) -> Path:
    """Measure, and write adding.md and adding.png."""
    results = measure(STARTS_BY_STEPS, UPDATES, seed)
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "adding.png", results)
    page = folder / "adding.md"
    page.write_text(describe(results, UPDATES, seed))
    return page


def draw(path: Path, results: Results) -> None:
    """Above the errors by updates, a line for each seed; below how far gradients reach after training."""
    figure = Figure(figsize=(5.2 * len(results), 7.5), layout="constrained")
    plots = figure.subplots(2, len(results), squeeze=False)
    for (errors, reach), (steps, by_name) in zip(plots.T, results.items(), strict=True):
        colours = {name: f"C{i}" for i, name in enumerate(STARTS_BY_STEPS[200])}
        for name, seeds in by_name.items():
            for i, learned in enumerate(seeds):
                style = {"color": colours[name], "label": name if i == 0 else None}
                updates = CHECK_EVERY * np.arange(1, len(learned.errors) + 1)
                errors.plot(updates, learned.errors, **style)
                reach.plot(np.arange(1, steps), np.where(learned.reach > 0, learned.reach, np.nan)[1:], **style)
        errors.axhline(OF_SAYING_ONE, color="grey", linestyle=":")
        errors.axhline(SOLVED, color="grey", linestyle="--")
        errors.set(yscale="log", xlabel="updates", ylabel="squared error, held out", title=f"T = {steps:,}")
        reach.set(xscale="log", yscale="log", ylim=(1e-20, 1e3), xlabel="distance T − t, steps")
        reach.set_ylabel("gradient after training, relative to distance 1")
        for axes in (errors, reach):
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def describe(results: Results, updates: int, seed: int) -> str:
    """The page in Markdown."""
    parts = [
        "# The adding problem: who learns to keep two numbers",
        f"`python -m models compare adding --seed {seed}`: each step has a number and a mark, and the sum of the two "
        "marked numbers, one in each half of the sequence, is asked for at the end (Hochreiter and Schmidhuber 1997). "
        f"One layer of {UNITS} units, {SEEDS} seeds, Adam with a rate of {LEARNING_RATES['lstm']:g} (ReLU "
        f"{LEARNING_RATES['relu']:g}, for the greater one overflows), {BATCH} sequences an update, at most {updates:,} "
        "updates: too few to say that a layer could never learn it, and rates that were not searched for each start "
        f"favour some. Solved is a squared error below {SOLVED:g} on {HELD_OUT} sequences that training never sees, "
        f"looked at after each {CHECK_EVERY} updates; who always says 1 has {OF_SAYING_ONE:.3f}. The gradient is that "
        "of [gradients.md](gradients.md), after training: where a layer has solved it, at that moment; no further than "
        f"the sequence is long. With T = {max(STARTS_BY_STEPS):,} only the start was trained that learned T = "
        f"{min(STARTS_BY_STEPS)} the soonest: what the others do there is not known.",
        "![errors by updates, and gradients after training](adding.png)",
    ]
    for steps, by_name in results.items():
        header = [
            "start", "solved after so many updates", "mean, 95 % interval", "least error",
            f"gradient at distance {steps - 1:,}",
        ]  # fmt: skip
        rows = [
            [
                name,
                ", ".join(str(learned.solved_after or "not") for learned in seeds),
                _mean([learned.solved_after for learned in seeds]),
                ", ".join(f"{min(learned.errors):.2g}" for learned in seeds),
                ", ".join(f"{learned.reach[-1]:.2g}" for learned in seeds),
            ]
            for name, seeds in by_name.items()
        ]
        parts += [f"## T = {steps:,}", table(header, rows)]
    return "\n\n".join(parts) + "\n"


def _mean(updates: Sequence[int | None]) -> str:
    """With Student's interval, where all have solved it."""
    solved = [float(one) for one in updates if one]
    return "{1:.0f} ± {2:.0f}".format(*spread_of(solved)) if len(solved) == SEEDS else ""
