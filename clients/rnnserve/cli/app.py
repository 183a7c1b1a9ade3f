"""The commands."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rnnserve import Answer, Decoding, Model, RnnserveError
from rnnserve.cli import copies, loading, show, watching, writing
from rnnserve.cli import demo as story
from rnnserve.cli.bars import Bars
from rnnserve.cli.inputs import (
    Places,
    Recording,
    at_rate,
    not_empty,
    opened,
    read_sequences,
    read_steps,
    shown,
    write_sample,
)
from rnnserve.cli.live import StreamView
from rnnserve.cli.options import Options, Threshold
from rnnserve.cli.outcome import REFUSED, BadInput, exit_codes, placed, stderr, stdout
from rnnserve.stream import Stream
from rnnserve.tensors import Input

app = typer.Typer(
    help="Stream steps and sequences to an rnnserve server. Exit codes: 0 good, 1 refused, 2 usage, 3 unreachable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    context: typer.Context,
    target: Annotated[str, typer.Option("--target", "-t", envvar="RNNSERVE_TARGET")] = "localhost:50051",
    tls: Annotated[bool, typer.Option("--tls", help="Connect over TLS.")] = False,
    ca_file: Annotated[Path | None, typer.Option(help="CA certificates for TLS, instead of the usual ones.")] = None,
    token: Annotated[str | None, typer.Option(envvar="RNNSERVE_TOKEN", show_envvar=True)] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer.", min=0.001)] = 30.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")] = False,
) -> None:
    """Where the server is, and how to print."""
    context.obj = Options(target, ca_file or tls, token, timeout_s, json)


@app.command()
def models(context: typer.Context, name: Annotated[str | None, typer.Argument()] = None) -> None:
    """What is served; all about one model if it is named."""
    with exit_codes(), _options(context).client() as client:
        found = client.models() if name is None else [client.model(name)]
        if _options(context).json:
            for model in found:
                show.print_json(show.model_json(model))
        else:
            stdout.print(show.models_table(found) if name is None else show.model_details(found[0]))


@app.command()
def stream(
    context: typer.Context,
    model: str,
    file: Annotated[str, typer.Argument(help="CSV, JSON lines or text; - for standard input.")] = "-",
    rate: Annotated[
        float | None, typer.Option(help="Steps a second; else as fast as they are answered.", min=0.001)
    ] = None,
    real_time: Annotated[bool, typer.Option("--real-time", help="At the rate of the model's recordings.")] = False,
    threshold: Threshold = 0.0,
) -> None:
    """Stream steps, and see a prediction about each of them, after it or as much later as the model looks ahead."""
    options = _options(context)
    with exit_codes(), options.client() as client, opened(file) as lines:
        described = client.model(model)
        rate_hz = _rate_hz(described, rate, real_time)
        read = deque[Input]()  # the steps about which no answer was printed yet
        located = read_steps(lines, described, shown(file))
        if described.streamable:  # otherwise opening the stream says why not
            located = not_empty(located, shown(file))
        places = Places(shown(file))
        steps = places.noted(located)
        paced = _kept(at_rate(steps, rate_hz) if rate_hz else steps, read)
        with (
            placed(lambda _: places.of(open_stream.next_step) if places else None),
            options.stream(client, described, threshold) as open_stream,
            _answer_printer(options, described) as print_answer,
        ):
            # Standard input is read here and not in a thread, which could not be stopped while it waits for a line.
            answers = map(open_stream.step, paced) if file == "-" else open_stream.steps(paced)
            for answer in itertools.chain(answers, _last_ones(open_stream, described)):
                places.drop_until(answer.step)
                if answer.step >= 0:
                    print_answer(answer, read.popleft())


def _kept(steps: Iterable[Input], read: deque[Input]) -> Iterator[Input]:
    for step in steps:
        read.append(step)
        yield step


def _last_ones(stream: Stream, model: Model) -> Iterator[Answer]:
    """That a look-ahead has kept, once all steps are sent."""
    if model.look_ahead:
        yield from stream.finish()


def _rate_hz(model: Model, rate_hz: float | None, real_time: bool) -> float | None:
    if rate_hz is None and real_time:
        if not model.steps_per_second:
            raise BadInput(f"{model.name} has no rate of its own: use --rate")
        return model.steps_per_second
    return rate_hz


@contextmanager
def _answer_printer(options: Options, model: Model) -> Iterator[Callable[[Answer, Input], None]]:
    """Draws on a terminal, else prints a line for each answer; or the text, where the model rewrites it."""
    if options.json:
        yield lambda answer, _: show.print_json(show.answer_json(answer, model))
    elif model.rewrites:
        yield lambda answer, step: print(model.rewritten(str(step), (answer.label,)), end="", flush=True)
        print()
    elif stdout.is_terminal:
        view = StreamView(model, f"{model.name}: {model.summary}")
        with view.on(stdout):
            yield view.show
    else:
        yield lambda answer, step: print(show.answer_line(answer, step), flush=True)


@app.command()
def predict(
    context: typer.Context,
    model: str,
    files: Annotated[
        list[Path] | None, typer.Argument(help="Each one sequence, or JSON lines of many.", metavar="FILE…")
    ] = None,
    texts: Annotated[list[str] | None, typer.Option("--text", help="A sequence itself, after those of files.")] = None,
    beam_width: Annotated[
        int, typer.Option("--beam", help="How many hypotheses an encoder-decoder follows at a time.", min=1, max=16)
    ] = 1,
    n_best: Annotated[
        int, typer.Option(help="How many of them are printed, the best first; at most --beam.", min=1, max=16)
    ] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="0 favours short ones, 1 compares them by the mean over their labels.", min=0, max=2)
    ] = 0.0,
    attention: Annotated[
        bool, typer.Option("--attention", help="Below each hypothesis, how much each label looked at each step.")
    ] = False,
    threshold: Threshold = 0.0,
) -> None:
    """Predict whole sequences, of any length. An encoder-decoder's hypotheses are printed with their scores."""
    options = _options(context)
    decoding = Decoding(beam_width, n_best, length_penalty, attention=attention)
    with exit_codes(), options.client() as client:
        if not files and not texts:
            raise BadInput("name a FILE, or give a --text")
        described = client.model(model)
        recordings = [recording for file in files or () for recording in read_sequences(file, described)]
        recordings += map(Recording.given, texts or ())
        with (
            Bars.drawn([recording.file for recording in recordings]) as bars,
            placed(lambda error: None if error.index is None else recordings[error.index].place(_step_of(error))),
        ):
            predictions = client.predict_many(
                model,
                [recording.value for recording in recordings],
                probabilities=bool(described.labels) and not described.encoder_decoder,
                threshold=threshold,
                decoding=None if decoding == Decoding() else decoding,  # other models refuse it
                on_progress=bars.show,
            )
            for recording, prediction in zip(recordings, bars.counted(predictions), strict=True):
                if options.json:
                    show.print_json(show.prediction_json(prediction, described, recording.value))
                else:
                    print(show.prediction_text(prediction, described, recording.value), flush=True)


def _step_of(refusal: RnnserveError) -> int | None:
    """Which step of its sequence it is about: the server counts numbers in steps, and texts in places."""
    step = refusal.metadata.get("step", refusal.metadata.get("place"))
    return None if step is None else int(step)


@app.command()
def health(context: typer.Context, model: Annotated[str | None, typer.Argument()] = None) -> None:
    """Whether the server, or one model, is ready. Exit code 1 if not."""
    with exit_codes(), _options(context).client() as client:
        status = client.health(model)
        if _options(context).json:
            show.print_json({"model": model, "status": status})
        else:
            print(status.replace("_", " "))
        if status != "serving":
            raise typer.Exit(REFUSED)


@app.command()
def sessions(
    context: typer.Context,
    session: Annotated[str | None, typer.Argument(help="One session; all if it is not named.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="End that session and erase it everywhere.")] = False,
) -> None:
    """The sessions that the server keeps, live and parked."""
    with exit_codes(), _options(context).client() as client:
        if delete:
            if session is None:
                raise BadInput("which session is to be deleted?")
            client.delete_session(session)
            stderr.print(f"{session} is erased")
            return
        found = client.sessions() if session is None else [client.session(session)]
        if _options(context).json:
            for info in found:
                show.print_json(show.session_json(info))
        elif found:
            show.print_whole(stdout, show.sessions_table(found))
        else:
            stdout.print("there are no sessions")


app.command()(watching.top)
app.command()(writing.generate)
app.command()(loading.load)
app.command()(loading.unload)
app.command("export")(copies.export)
app.command("import")(copies.import_)
app.command("fork")(copies.fork)


@app.command()
def samples(
    context: typer.Context,
    model: str,
    save: Annotated[Path | None, typer.Option(help="Also write them into this folder.")] = None,
) -> None:
    """The held-out recordings that ship with a model."""
    with exit_codes(), _options(context).client() as client:
        found, described = client.samples(model), client.model(model)
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            for sample in found:
                stderr.print(f"wrote {write_sample(sample.input, described, save, sample.name)}", soft_wrap=True)
        if _options(context).json:
            for sample in found:
                show.print_json(show.sample_json(sample))
        else:
            stdout.print(show.samples_table(found, described) if found else f"{model} ships no samples")


@app.command()
def demo(
    context: typer.Context,
    fast: Annotated[bool, typer.Option("--fast", help="Do not wait for the recorded rate.")] = False,
) -> None:
    """The whole story on held-out recordings, in about a minute."""
    options = _options(context)
    with exit_codes(), options.client() as client:
        if not story.tell(client, options.stream, stdout, real_time=not fast):
            raise typer.Exit(REFUSED)


def _options(context: typer.Context) -> Options:
    found: Options = context.obj
    return found
