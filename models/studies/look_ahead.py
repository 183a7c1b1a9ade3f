"""Quality against delay: how much of what a backward pass brings can a live stream have by waiting a few characters?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from models.studies.variants import Measured, as_large_as, describe_variants, spread_of, train_variants
from models.tasks.diacritics import DIACRITICS, LIVE
from models.tasks.task import Task
from models.training.card import parameters_of

DELAYS = (0, 1, 2, 3, 5, 8, 13)  # characters
WHOLE = "∞ (bidirectional)"
UNITS, EPOCHS = 128, 9


def variants(epochs: int = EPOCHS) -> dict[str, Task]:
    """One forward LSTM layer for each delay, and a bidirectional one with about as many parameters."""
    settings = replace(LIVE.settings, epochs=epochs, dropout=0.3)
    forward = LIVE.network.model_copy(update={"hidden_size": UNITS, "layers": 1})
    both_ways = as_large_as(forward.model_copy(update={"direction": "bidirectional"}), parameters_of(forward))
    live = replace(LIVE, network=forward, settings=settings, is_long=False)
    whole = replace(DIACRITICS, network=both_ways, settings=settings, is_long=False)
    return {**{f"{k}": replace(live, look_ahead=k) for k in DELAYS}, WHOLE: whole}


def compare(folder: Path, seed: int) -> Path:
    """Train, and write look_ahead.md and look_ahead.png."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = train_variants(variants(), seed)
    draw(folder / "look_ahead.png", measured)
    page = folder / "look_ahead.md"
    page.write_text(describe(measured, seed))
    return page


def draw(path: Path, measured: Mapping[str, Measured]) -> None:
    """The mean of each delay with its interval, and that of the bidirectional network as a band."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    delayed = [spread_of(measured[f"{k}"].values) for k in DELAYS]
    axes.errorbar(DELAYS, [one.mean for one in delayed], [one.half_width for one in delayed], marker="o", capsize=3)
    _, mean, half = spread_of(measured[WHOLE].values)
    axes.axhspan(mean - half, mean + half, color="C1", alpha=0.3, label="bidirectional, 95 % interval")
    axes.set(xlabel="delay, characters", ylabel=measured[WHOLE].metric)
    axes.legend(frameon=False, loc="lower left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def describe(measured: Mapping[str, Measured], seed: int) -> str:
    """The page in Markdown."""
    parts = (
        "# Look-ahead: quality against delay",
        f"`python -m models compare look-ahead --seed {seed}`: Turkish letters that have lost their marks, as in the "
        f"bundle `diacritics-live`, here with one LSTM layer of {UNITS} units and {EPOCHS} epochs. A forward network "
        "that answers about a character after so many more, and a bidirectional one with about as many parameters, "
        "which needs the whole text. A delay must be learned, too: the state has to hold the characters that are still "
        "to be answered about, for which so small a network has little room and so few epochs little time. That is "
        "probably why the curve falls again, in the end below that without delay; no run here tells room from time. "
        "`diacritics-live` waits for 5 characters with two layers of twice the units, trained for longer.",
        "![quality against delay](look_ahead.png)",
        describe_variants(measured),
    )
    return "\n\n".join(parts) + "\n"
