"""The commands that copy sessions."""

from pathlib import Path
from typing import Annotated

import typer

from rnnserve.cli import show
from rnnserve.cli.options import Options
from rnnserve.cli.outcome import exit_codes, stderr
from rnnserve.results import ResumePoint

NewId = Annotated[str | None, typer.Option("--session", help="The id of the copy; else a random one.")]


def export(context: typer.Context, session: str, file: Annotated[Path, typer.Argument(help="Written over.")]) -> None:
    """Save a copy of a session in a file; the session goes on."""
    options: Options = context.obj
    with exit_codes(), options.client() as client:
        snapshot = client.export_session(session)
        file.write_bytes(snapshot.data)
        if options.json:
            show.print_json(show.snapshot_json(snapshot))
        else:
            stderr.print(f"wrote {file}: {show.snapshot_line(snapshot)}", soft_wrap=True)


def import_(context: typer.Context, file: Path, session: NewId = None) -> None:
    """Begin a session from a file that `export` wrote, and print where a stream can resume it."""
    options: Options = context.obj
    with exit_codes(), options.client() as client:
        _print(client.import_session(file.read_bytes(), session), options)


def fork(context: typer.Context, session: str, new: NewId = None) -> None:
    """Begin a session as a copy of another one, and print where a stream can resume it."""
    options: Options = context.obj
    with exit_codes(), options.client() as client:
        _print(client.fork_session(session, new), options)


def _print(point: ResumePoint, options: Options) -> None:
    if options.json:
        show.print_json(point._asdict())
    else:
        print(point)
        stderr.print(f"{point.session} is parked at step {point.answered_step}; its token is a secret", soft_wrap=True)
