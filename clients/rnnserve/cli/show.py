"""What commands print: tables for people, JSON lines for scripts."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rnnserve.models import Model, Sample
from rnnserve.results import Answer, Hypothesis, Notice, Prediction
from rnnserve.session import Durability
from rnnserve.sessions import SessionInfo
from rnnserve.snapshots import Snapshot
from rnnserve.tensors import Array, Input
from rnnserve.texts import text_steps

NO_LABEL = "—"
"""Where the model is less sure than the threshold."""

_SHADES = " ░▒▓█"
_UNLIMITED = 10_000
_SHOWN_SYMBOLS = 50


def print_json(value: Any) -> None:
    """One line, out at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def models_table(models: Iterable[Model]) -> Table:
    """What each does, and below it how it serves, its network, and its quality on held-out data."""
    table = _table("model", "what it does")
    for model in models:
        behind = f", {model.look_ahead} behind" if model.look_ahead else ""
        facts = [f"streams{behind}" if model.streamable else "sequences", _network(model)]
        if model.quality:
            facts.append(f"{model.quality.value:.4g} {model.quality.metric}")
        about = Text(f"{model.summary}\n").append(" · ".join(facts), style="dim")
        table.add_row(f"{model.name} v{model.version}", about)
    return table


def print_whole(console: Console, table: Table) -> None:
    """A line for each row, which the terminal wraps where it is too narrow: nothing is cut, and `grep` finds it all."""
    table.width = console.measure(table, options=console.options.update(width=_UNLIMITED)).maximum
    console.print(table, crop=False)


def sessions_table(sessions: Iterable[SessionInfo]) -> Table:
    """One line for each session."""
    table = _table("session", "model", "state", "steps", "last used", "bytes")
    for info in sessions:
        used = info.used_at.astimezone().strftime("%b %d %H:%M:%S")
        state = "live" if info.live else "parked"
        name = f"{info.model} v{info.version}"
        table.add_row(info.id, name, state, f"{info.next_step:,}", used, f"{info.size_bytes:,}")
    return table


def session_json(info: SessionInfo) -> dict[str, object]:
    """All that is known of a session."""
    return dataclasses.asdict(info) | {"opened_at": info.opened_at.isoformat(), "used_at": info.used_at.isoformat()}


def snapshot_json(snapshot: Snapshot) -> dict[str, object]:
    """All that it says in clear."""
    clear = {name: value for name, value in dataclasses.asdict(snapshot).items() if name != "data"}
    expires_at = snapshot.expires_at and snapshot.expires_at.isoformat()
    return clear | {"created_at": snapshot.created_at.isoformat(), "expires_at": expires_at}


def snapshot_line(snapshot: Snapshot) -> str:
    """What it is, and for how long it is good."""
    until = snapshot.expires_at and f"{snapshot.expires_at.astimezone():%b %d %H:%M:%S}"
    good = f"can be imported until {until}" if until else "can be imported at any time"
    return f"{snapshot.model} v{snapshot.version} before step {snapshot.next_step}; it {good}"


def model_details(model: Model) -> Table:
    """All about one model."""
    table = Table.grid(padding=(0, 2))
    data = model.training_data
    rows = {
        "model": f"{model.name} v{model.version}",
        "what it does": model.summary,
        "pattern": model.pattern,
        "network": f"{_network(model)}, {model.hidden_size} wide, {model.parameters:,} parameters",
        "serves": _serves(model),
        "not streamable": model.why_not_streamable,
        "a step": _step(model),
        "unknown steps": f"are read as {model.unknown!r}" if model.unknown is not None else "",
        "looks ahead": f"{model.look_ahead} steps: it answers about a step so much later" if model.look_ahead else "",
        "missing values": model.missing_values,
        "steps a second": f"{model.steps_per_second:g}" if model.steps_per_second else "",
        "writes": _writes(model),
        "answers": _labels(model),
        "quality": _quality(model),
        "trained on": f"{data.name} ({data.licence}; {data.credit})" if data else "",
        "weights": model.weights_sha256,
    }
    for name, value in rows.items():
        if value:
            table.add_row(Text(name, style="bold"), value)
    return table


def samples_table(samples: Iterable[Sample], model: Model) -> Table:
    """One line for each sample."""
    table = _table("sample", "label", "steps", "what it is")
    for sample in samples:
        steps = text_steps(sample.input, model.unit) if isinstance(sample.input, str) else sample.input
        table.add_row(sample.name, sample.label or "", str(len(steps)), sample.description)
    return table


def model_json(model: Model) -> dict[str, Any]:
    """For scripts."""
    return dataclasses.asdict(model)


def sample_json(sample: Sample) -> dict[str, Any]:
    """For scripts."""
    value = sample.input if isinstance(sample.input, str) else sample.input.tolist()
    return {**dataclasses.asdict(sample), "input": value}


def answer_json(answer: Answer, model: Model) -> dict[str, Any]:
    """For scripts."""
    about = {"step": answer.step, "label": answer.label, "output": answer.output.tolist()}
    return {**about, "probabilities": _by_label(answer.probabilities, model)}


def answer_line(answer: Answer, step: Input) -> str:
    """For people, where there is no terminal to draw on; with the step that it is about, if that is a text's."""
    read = f"{step}\t" if isinstance(step, str) else ""
    return f"{answer.step}\t{read}{_said(answer.label, answer.output, answer.probabilities)}"


def notice_line(notice: Notice, durability: Durability) -> str:
    """What happened, and what a stream of that durability does then."""
    if notice.reason == "draining" and durability != "none":
        return f"{notice.message}; the stream goes on by itself once a server answers again"
    return notice.message


def prediction_json(prediction: Prediction, model: Model, value: Input) -> dict[str, Any]:
    """For scripts; `value` is what it is about."""
    rows = prediction.probabilities
    return {
        "text": rewritten(prediction, model, value),
        "label": prediction.label,
        "labels": list(prediction.labels),
        "outputs": prediction.outputs.tolist(),
        "probabilities": None if rows is None else [_by_label(row, model) for row in rows],
        "hypotheses": list(map(_hypothesis_json, prediction.hypotheses)),
    }


def _hypothesis_json(hypothesis: Hypothesis) -> dict[str, Any]:
    told = {"labels": list(hypothesis.labels), "score": hypothesis.score, "is_cut": hypothesis.is_cut}
    return told if hypothesis.attention is None else told | {"attention": hypothesis.attention.tolist()}


def rewritten(prediction: Prediction, model: Model, value: Input) -> str | None:
    """The text that the labels make of this one; None where they make none."""
    return model.rewritten(value, prediction.labels) if model.rewrites and isinstance(value, str) else None


def prediction_text(prediction: Prediction, model: Model, value: Input) -> str:
    """About the last step, or the only one; where there are more all labels, or the text that they make of this one.

    A line for each hypothesis, and below it its attention, if that was asked for.
    """
    text = rewritten(prediction, model, value)
    if text is not None:
        return text
    if prediction.hypotheses:
        return "\n".join(_hypothesis_text(each, model, value) for each in prediction.hypotheses)
    if len(prediction.labels) > 1:
        return " ".join(label or NO_LABEL for label in prediction.labels)
    probabilities = None if prediction.probabilities is None else prediction.probabilities[-1]
    return _said(prediction.label, prediction.output, probabilities)


def _hypothesis_text(hypothesis: Hypothesis, model: Model, value: Input) -> str:
    said = f"{' '.join(hypothesis.labels)}\t{hypothesis.score:.3f}"
    if hypothesis.attention is None:
        return said
    numbers = map(str, range(hypothesis.attention.shape[1]))
    steps = list(text_steps(value, model.unit) if isinstance(value, str) else numbers)
    return f"{said}\n{_attention_text(hypothesis.labels, steps, hypothesis.attention)}"


def _attention_text(labels: Sequence[str], steps: Sequence[str], attention: Array) -> str:
    """A row for each label, a column for each step, the darker the more it was looked at."""
    margin = max(map(len, labels), default=0)
    rows = [" " * margin + "".join(f" {step}" for step in steps)]
    for label, weights in zip(labels, attention, strict=True):
        shades = (_SHADES[round(float(weight) * (len(_SHADES) - 1))] for weight in weights)
        rows.append(
            f"{label:>{margin}}" + "".join(f" {shade * len(step)}" for shade, step in zip(shades, steps, strict=True))
        )
    return "\n".join(row.rstrip() for row in rows)


def _table(names: str, *headings: str) -> Table:
    """The names in the first column are kept whole, for they are what other commands take."""
    table = Table(box=None, header_style="bold")
    table.add_column(names, no_wrap=True)
    for heading in headings:
        table.add_column(heading)
    return table


def _said(label: str | None, output: Array, probabilities: Array | None) -> str:
    if probabilities is None:  # the commands ask for them wherever there are labels
        return " ".join(f"{value:.6g}" for value in output)
    return f"{label or NO_LABEL}\t{probabilities.max():.3f}"


def _by_label(probabilities: Array | None, model: Model) -> dict[str, float] | None:
    if probabilities is None:
        return None
    return dict(zip(model.labels, probabilities.tolist(), strict=True))


def _step(model: Model) -> str:
    """What the model reads."""
    if not model.symbols:
        return ", ".join(model.features)
    symbols = model.symbols[:_SHOWN_SYMBOLS]
    shown = " ".join(symbols) if model.unit == "word" else repr("".join(symbols))
    return f"a {model.unit} of {model.symbol_count:,}: {shown}{' …' * (len(symbols) < model.symbol_count)}"


def _labels(model: Model) -> str:
    """What it answers with."""
    if not model.labels:
        return f"{model.outputs} numbers"
    return ", ".join(model.labels[:_SHOWN_SYMBOLS]) + ", …" * (len(model.labels) > _SHOWN_SYMBOLS)


def _network(model: Model) -> str:
    deep = f" of {model.transition_layers} cells" if model.transition_layers > 1 else ""
    return f"{model.cell}, {model.layers} layer{'s' * (model.layers != 1)}{deep}, {model.direction}"


def _serves(model: Model) -> str:
    return "streams, whole sequences" if model.streamable else "whole sequences"


def _writes(model: Model) -> str:
    if not model.max_symbols:
        return ""
    until = "" if model.end_symbol is None else f", until {model.end_symbol!r}"
    return f"up to {model.max_symbols:,} symbols, from {model.start_symbol!r} on{until}"


def _quality(model: Model) -> str:
    quality = model.quality
    if quality is None:
        return ""
    interval = "{:.4g} to {:.4g}; ".format(*quality.interval_95) if quality.interval_95 else ""
    return f"{quality.metric} {quality.value:.4g} ({interval}{quality.split}, {quality.items} items)"
