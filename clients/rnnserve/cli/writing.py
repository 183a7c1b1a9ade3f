"""The command that has a model write."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rnnserve.cli import show
from rnnserve.cli.loading import Version
from rnnserve.cli.options import Options
from rnnserve.cli.outcome import BadInput, exit_codes, stderr
from rnnserve.generation import Generation
from rnnserve.music import Tune, TuneError, midi_library


def generate(
    context: typer.Context,
    model: str,
    prompt: Annotated[str, typer.Option(help="What the model reads first, as it reads texts.")] = "",
    version: Version = 0,
    max_symbols: Annotated[int, typer.Option(help="0 = as many as the model may write.", min=0, max=2**32 - 1)] = 0,
    temperature: Annotated[
        float, typer.Option(help="0 = the most probable symbol each time, 1 = as the model says.", min=0, max=10)
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Only of so many of the most probable symbols; 0 = of all.", min=0, max=2**32 - 1)
    ] = 0,
    top_p: Annotated[
        float, typer.Option(help="Only of the fewest that together are as probable as this; 1 = of all.", min=0, max=1)
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Else the server picks one.", min=0, max=2**64 - 1)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the output, as its last part.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same with the same seed, whatever else the server computes.")
    ] = False,
    midi: Annotated[Path | None, typer.Option(help="Also write the tune, prompt included, there; over it.")] = None,
    abc: Annotated[Path | None, typer.Option(help="The same in ABC notation.")] = None,
) -> None:
    """Have a one-to-many model write, symbol by symbol, as they come."""
    options: Options = context.obj
    with exit_codes(), options.client() as client:
        _check_files(midi, abc)
        with client.generate(
            model,
            prompt,
            version=version,
            max_symbols=max_symbols,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop or (),
            deterministic=deterministic,
        ) as output:
            _print(output, as_json=options.json)
        if midi or abc:
            _save(f"{prompt}{output.separator}{output.text}", model, midi, abc)


def _check_files(midi: Path | None, abc: Path | None) -> None:
    """Before anything is written that could then not be kept. Raises BadInput."""
    for file in (midi, abc):
        if file is not None and not file.parent.is_dir():
            raise BadInput(f"{file}: there is no such folder")
        if file is not None and file.is_dir():
            raise BadInput(f"{file}: this is a folder")
    if midi is not None:
        try:
            midi_library()
        except ImportError as error:
            raise BadInput(str(error)) from None


def _print(output: Generation, *, as_json: bool) -> None:
    if as_json:
        for symbol in output:
            about = {"step": symbol.step, "text": symbol.text, "log_probability": symbol.log_probability}
            show.print_json(about)
        show.print_json({"text": output.text, "finish": output.finish, "stop": output.stop, "seed": output.seed})
        return
    try:
        for symbol in output:
            sys.stdout.write(f"{output.separator if symbol.step else ''}{symbol.text}")
            sys.stdout.flush()
    finally:
        if output.text:
            print(flush=True)
    stderr.print(f"finish: {output.finish}; seed: {output.seed}")


def _save(text: str, title: str, midi: Path | None, abc: Path | None) -> None:
    """Raises BadInput; what was written is printed by now."""
    try:
        tune = Tune.of(text.split())
    except TuneError as error:
        raise BadInput(f"this is no tune, so no file is written: {error}") from None
    if tune.left_over:
        stderr.print(f"left out, for the frame has no end: {' '.join(tune.left_over)}")
    if midi is not None:
        tune.save_midi(midi)
    if abc is not None:
        tune.save_abc(abc, title)
    for file in filter(None, (midi, abc)):
        stderr.print(f"wrote {file}", soft_wrap=True)
