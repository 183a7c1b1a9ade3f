"""The model card, README.md of a bundle: what it is for, what it was trained on, how well it does and where it errs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.manifest import Manifest
from models.recurrent import NetworkSpec, RecurrentNetwork
from models.tasks.task import Recordings, Run, Task
from models.training.measure import Confusion, Live

CARD = "README.md"
ABLATION = "ablation.md"
DEPTH_TITLE = "## What depth brings\n"
HEARD = (
    "How often the answer after so many steps is right; a recording that is already over counts with its last answer."
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_card(
    folder: Path,
    task: Task,
    manifest: Manifest,
    runs: Sequence[tuple[Run, float, Live | None]],
    errors: Sequence[Confusion],
    test: Recordings,
    heard: Mapping[int, float],
) -> None:
    """Write README.md from what was measured and the task's words; an ablation there is kept."""
    sections = [
        f"# {manifest.name}\n\n{manifest.summary}",
        task.words.purpose,
        "## Network\n\n" + describe(manifest.network),
        f"## Quality\n\n{_quality(manifest)}\n\n{_repeats(task, runs)}\n\nFor comparison:\n\n{task.words.references}",
        describe_heard(task, heard),
        f"## Where it errs\n\n{describe_errors(task, errors, test)}\n\n{task.words.limits}",
        f"## Data\n\n{task.words.data}\n\n{_source(manifest)}",
        f"## Training\n\n{task.words.training}\n\n{_settings(task)}\n\n![curves](curves.png)",
        f"## Again\n\n```\npython -m models train {task.name} --seed {runs[0][0].seed}\n"
        f"python -m models evaluate {task.name}\n```",
    ]
    (folder / CARD).write_text("\n\n".join(section for section in sections if section) + "\n")
    add_ablation(folder)


def add_ablation(folder: Path) -> None:
    """Put `ablation.md`, where there is one, at the end of the card."""
    if (folder / ABLATION).exists():
        card = (folder / CARD).read_text().partition(DEPTH_TITLE)[0].rstrip()
        (folder / CARD).write_text(f"{card}\n\n{DEPTH_TITLE}\n{(folder / ABLATION).read_text()}")


def describe(spec: NetworkSpec) -> str:
    """The three blocks of a network and its size, in words."""
    rows = [
        ("input to hidden", _layers(spec.input_layers, "straight into the cell")),
        (
            "hidden to hidden",
            f"{spec.layers} × {spec.cell}, {spec.direction}, {spec.hidden_size} units, "
            f"{spec.transition_layers} {'cells' if spec.transition_layers > 1 else 'cell'} in a row within a step",
        ),
        ("hidden to output", _layers(spec.output_layers, "one linear layer") + f", {spec.outputs} outputs"),
        ("answers about", "each step" if spec.readout == "each_step" else "the mean over all steps"),
        ("streams", spec.why_not_streamable or "yes"),
        ("parameters", f"{parameters_of(spec):,}"),
    ]
    return table(["", ""], rows)


def parameters_of(spec: NetworkSpec) -> int:
    """How many numbers a network learns."""
    return sum(parameter.numel() for parameter in RecurrentNetwork(spec).parameters())


def describe_errors(task: Task, errors: Sequence[Confusion], test: Recordings) -> str:
    """The classes most often taken for another."""
    sizes = Counter(recording.label for recording in test)
    named = [f"{task.labels[e.truth]} for {task.labels[e.answer]} ({e.times} of {sizes[e.truth]})" for e in errors[:4]]
    total = sum(error.times for error in errors)
    return f"{total} of {len(test)} wrong. Most often it takes " + "; ".join(named) + "."


def _layers(sizes: tuple[int, ...], none: str) -> str:
    return " → ".join(f"{size} ReLU" for size in sizes) or none


def _quality(manifest: Manifest) -> str:
    quality = manifest.quality
    return f"**{quality.value:.2f}** {quality.metric}, on {quality.items} items: {quality.split}."


def _repeats(task: Task, runs: Sequence[tuple[Run, float, Live | None]]) -> str:
    mean = sum(percent for _, percent, _ in runs) / len(runs)
    header, rows = ["run", task.metric], [[str(run), f"{percent:.2f}"] for run, percent, _ in runs]
    lives = [live for _, _, live in runs if live is not None]
    rows.append(["mean", f"{mean:.2f}"])
    if lives:
        header += ["whole recordings, last answer", "whole recordings, mean answer", "steps after the first 4 s"]
        lives.append(Live(*(sum(column) / len(lives) for column in zip(*lives, strict=True))))
        rows = [[*row, *(f"{value:.1f}" for value in live)] for row, live in zip(rows, lives, strict=True)]
    return f"The same over {task.repeats_over}; the weights here are the first one's:\n\n{table(header, rows)}"


def describe_heard(task: Task, heard: Mapping[int, float]) -> str:
    """How often a network is right after so many steps; nothing for one that does not stream."""
    if not heard:
        return ""
    some = [n for n in heard if n in task.heard_steps][:: max(1, len(heard) // 7)]
    rate = task.input.steps_per_second
    rows = [["steps", *map(str, some)], ["seconds", *(f"{n / rate:.3g}" for n in some)]]
    rows.append(["accuracy, %", *(f"{heard[n]:.1f}" for n in some)])
    return f"## As it listens\n\n{HEARD}\n\n{table(rows[0], rows[1:])}\n\n![accuracy by frames heard](frames_heard.png)"


def _source(manifest: Manifest) -> str:
    data = manifest.data
    rows = [["source", data.archive], ["SHA-256", data.archive_sha256], ["licence", data.licence]]
    return table(["data", data.name], [*rows, ["credit", data.credit]])


def _settings(task: Task) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in vars(task.settings).items() if value)
    return (
        "Settings, number of epochs among them, were chosen on parts of the training data held out. The curves are of "
        "a rehearsal on the training part, which the validation part may stop early; then the network is trained "
        f"afresh on both and scored on the test part. Settings: {settings}."
    )
