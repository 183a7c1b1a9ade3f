"""The model card, README.md of a bundle: what it is for, what it was trained on, how well it does and where it errs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from models.manifest import FeatureInput, Manifest
from models.markdown import table
from models.recurrent import DecoderSpec, NetworkSpec
from models.seq2seq import network_of
from models.tasks.task import Run, Task
from models.training.measure import Live
from models.training.runs import Result

CARD = "README.md"
HEARD = (
    "How often the answer after so many steps is right; a recording that is already over counts with its last answer."
)


def write_card(
    folder: Path,
    task: Task,
    manifest: Manifest,
    runs: Sequence[tuple[Run, Result]],
    errors: str,
    heard: Mapping[int, float],
) -> None:
    """Write README.md from what was measured and the task's words."""
    quality = f"{_quality(manifest, runs[0][1])}\n\n{_repeats(task, runs)}"
    sections = [
        f"# {manifest.name}\n\n{manifest.summary}",
        task.words.purpose,
        "## Network\n\n" + describe(manifest),
        f"## Quality\n\n{quality}\n\nFor comparison:\n\n{task.words.references}",
        describe_heard(manifest, heard),
        f"## Where it errs\n\n{errors}\n\n{task.words.limits}",
        f"## Data\n\n{task.words.data}\n\n{_source(manifest)}",
        f"## Training\n\n{task.words.training}\n\n{_settings(task)}\n\n![curves](curves.png)",
        f"## Again\n\n```\npython -m models train {task.name} --seed {runs[0][0].seed}\n"
        f"python -m models evaluate {task.name}\n```",
    ]
    (folder / CARD).write_text("\n\n".join(section for section in sections if section) + "\n")


def describe(manifest: Manifest) -> str:
    """The three blocks of a network and its size, in words."""
    spec = manifest.network
    rows = [
        ("input to hidden", _layers(spec.input_layers, "straight into the cell")),
        (
            "hidden to hidden",
            f"{spec.layers} × {spec.cell}, {spec.direction}, {spec.hidden_size} units, "
            f"{spec.transition_layers} {'cells' if spec.transition_layers > 1 else 'cell'} in a row within a step",
        ),
        ("hidden to output", _layers(spec.output_layers, "one linear layer") + f", {spec.outputs} outputs"),
        ("answers about", "each step" if spec.readout == "each_step" else "the mean over all steps"),
        *([("writes", _decoder(spec.decoder))] if spec.decoder else []),
        ("streams", streams(manifest)),
        ("parameters", f"{parameters_of(spec):,}"),
    ]
    return table(["", ""], rows)


def streams(manifest: Manifest) -> str:
    """Whether it does, and how far behind, or why not."""
    if why_not := manifest.network.why_not_streamable:
        return f"no: {why_not}"
    return f"yes, {manifest.look_ahead} steps behind" if manifest.look_ahead else "yes"


def parameters_of(spec: NetworkSpec) -> int:
    """How many numbers a network learns."""
    return sum(parameter.numel() for parameter in network_of(spec).parameters())


def _decoder(decoder: DecoderSpec) -> str:
    looks = "with attention to all steps of the input" if decoder.attention else "from where the encoder has ended"
    return f"up to {decoder.max_labels} labels, {looks}"


def _layers(sizes: tuple[int, ...], none: str) -> str:
    return " → ".join(f"{size} ReLU" for size in sizes) or none


def _quality(manifest: Manifest, shipped: Result) -> str:
    quality = manifest.quality
    rows = [
        [score.metric, f"{score.value:.2f}", f"{score.low:.2f} to {score.high:.2f}", f"{score.items:,}"]
        for score in shipped.scores
    ]
    own = manifest.on_samples
    of_own = (
        f"\n\nOn the {own.items} items of the samples beside this card: {own.value:.2f} {own.metric}." if own else ""
    )
    return (
        f"**{quality.value:.2f}** {quality.metric}, on {quality.items:,} items: {quality.split}.\n\n"
        f"{table(['measured', 'value', '95 % interval', 'items'], rows)}{of_own}"
    )


def _repeats(task: Task, runs: Sequence[tuple[Run, Result]]) -> str:
    values = [result.scores[0].value for _, result in runs]
    header, rows = (
        ["run", runs[0][1].scores[0].metric],
        [[str(run), f"{value:.2f}"] for (run, _), value in zip(runs, values, strict=True)],
    )
    lives = [result.live for _, result in runs if result.live is not None]
    rows.append(["mean", f"{sum(values) / len(values):.2f}"])
    if lives:
        header += ["whole recordings, last answer", "whole recordings, mean answer", "steps after the first 4 s"]
        lives.append(Live(*(sum(column) / len(lives) for column in zip(*lives, strict=True))))
        rows = [[*row, *(f"{value:.1f}" for value in live)] for row, live in zip(rows, lives, strict=True)]
    if len(runs) == 1:
        return f"Trained once ({runs[0][0]})."
    return f"The same over {task.repeats_over}; the weights here are the first one's:\n\n{table(header, rows)}"


def describe_heard(manifest: Manifest, heard: Mapping[int, float]) -> str:
    """How often a network is right after so many steps; nothing for one that does not stream."""
    if not heard:
        return ""
    some = list(heard)[:: max(1, len(heard) // 7)]
    rows = [["steps", *map(str, some)], ["accuracy, %", *(f"{heard[n]:.1f}" for n in some)]]
    if isinstance(manifest.input, FeatureInput) and (rate := manifest.input.steps_per_second):
        rows.insert(1, ["seconds", *(f"{n / rate:.3g}" for n in some)])
    return f"## As it listens\n\n{HEARD}\n\n{table(rows[0], rows[1:])}\n\n![accuracy by frames heard](frames_heard.png)"


def _source(manifest: Manifest) -> str:
    data = manifest.data
    rows = [["source", data.archive], ["SHA-256", data.archive_sha256], ["licence", data.licence]]
    return table(["data", data.name], [*rows, ["credit", data.credit]])


def _settings(task: Task) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in vars(task.settings).items() if value)
    how = (
        "the curves are of the training itself, which leaves the validation part out."
        if task.is_long
        else "the curves are of a rehearsal on the training part, which the validation part may stop early; then the "
        "network is trained afresh on both and scored on the test part."
    )
    return (
        "But for what is said above, settings and the number of epochs were chosen on parts of the training data held "
        "out; "
        f"{how} Settings: {settings}."
    )
