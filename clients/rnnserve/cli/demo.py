"""`rnnserve demo`: real time, whole sequences, and a refusal, on the server's own held-out recordings."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.console import Console
from rich.rule import Rule

from rnnserve.cli.inputs import at_rate
from rnnserve.cli.live import StreamView
from rnnserve.cli.outcome import describe
from rnnserve.client import Client
from rnnserve.errors import ModelNotFound, ModelNotStreamable
from rnnserve.models import Model, Sample
from rnnserve.stream import Stream

OpenStream = Callable[[Client, Model], AbstractContextManager[Stream]]

LONGEST_S = 25.0
SLOWED_HZ = 5.0  # so that the eye can follow frames that have no rate of their own, or a very high one


def tell(client: Client, open_stream: OpenStream, console: Console, *, real_time: bool) -> bool:
    """Shows each part whose model is served; False if there was none."""
    console.print(Rule("1. Real time: an answer after every step"))
    shown = [
        _stream_sample(client, open_stream, console, name, real_time=real_time) for name in ("activity", "speaker")
    ]
    console.print(Rule("2. Whole sequences: a network that reads from both ends"))
    shown.append(_predict_samples(client, console, "speaker-bidirectional"))
    console.print(Rule("3. Asking that network to stream"))
    shown.append(_be_refused(client, console, "speaker-bidirectional"))
    return any(shown)


def _stream_sample(client: Client, open_stream: OpenStream, console: Console, name: str, *, real_time: bool) -> bool:
    found = _with_samples(client, console, name)
    if found is None:
        return False
    model, samples = found
    sample = max(samples, key=lambda sample: len(sample.input))
    rate_hz = model.steps_per_second if 0 < model.steps_per_second <= 30 else SLOWED_HZ
    steps = sample.input[: round(LONGEST_S * rate_hz)]
    pace = f"its own {rate_hz:g} steps a second"
    if rate_hz != model.steps_per_second:
        pace = f"{rate_hz:g} steps a second, slowed down to be seen"
    title = f"{name}: {sample.description} (truly: {sample.label}); the first {len(steps)} steps at {pace}"
    view = StreamView(model, title)
    with open_stream(client, model) as stream, view.on(console):
        for step in at_rate(steps, rate_hz) if real_time else steps:
            answer = stream.step(step)
            view.show(answer, step)
    console.print(f"after {answer.step + 1} steps it says {answer.label}, and it truly is {sample.label}\n")
    return True


def _predict_samples(client: Client, console: Console, name: str) -> bool:
    found = _with_samples(client, console, name)
    if found is None:
        return False
    _, samples = found
    predictions = client.predict_many(name, [sample.input for sample in samples])
    right = 0
    for sample, prediction in zip(samples, predictions, strict=True):
        right += prediction.label == sample.label
        mark = "✓" if prediction.label == sample.label else "✗"
        console.print(f"{mark} {sample.name}: {prediction.label} (truly: {sample.label}, {len(sample.input)} steps)")
    console.print(f"{right} of {len(samples)} held-out recordings right\n")
    return True


def _be_refused(client: Client, console: Console, name: str) -> bool:
    try:
        with client.stream(name):
            console.print(f"{name} streams, so there is nothing to refuse")
    except ModelNotStreamable as refusal:
        console.print(f"refused with {describe(refusal)}", soft_wrap=True)
    except ModelNotFound:
        console.print(f"this server has no model {name!r}: skipped")
        return False
    return True


def _with_samples(client: Client, console: Console, name: str) -> tuple[Model, list[Sample]] | None:
    try:
        model, samples = client.model(name), client.samples(name)
    except ModelNotFound:
        console.print(f"this server has no model {name!r}: skipped\n")
        return None
    if not samples:
        console.print(f"{name} ships no samples: skipped\n")
        return None
    return model, samples
