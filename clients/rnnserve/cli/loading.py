"""The commands that change what is served."""

from typing import Annotated

import typer

from rnnserve.cli import show
from rnnserve.cli.options import Options
from rnnserve.cli.outcome import exit_codes

Version = Annotated[int, typer.Option(help="0 = the newest.", min=0, max=2**32 - 1)]


def load(context: typer.Context, model: str, version: Version = 0) -> None:
    """Serve a model that is in the server's repository."""
    options: Options = context.obj
    with exit_codes(), options.client() as client:
        loaded = client.load_model(model, version)
        if options.json:
            show.print_json(show.model_json(loaded))
        else:
            print(f"{loaded.name}/{loaded.version} is served")


def unload(
    context: typer.Context,
    model: str,
    version: Version = 0,
    end_streams: Annotated[bool, typer.Option("--end-streams", help="Even if it has live ones.")] = False,
) -> None:
    """Serve a version of a model no more; its parked sessions stay."""
    options: Options = context.obj
    with exit_codes(), options.client() as client:
        unloaded = client.unload_model(model, version, end_streams=end_streams)
        if options.json:
            show.print_json({"name": model, "version": unloaded})
        else:
            print(f"{model}/{unloaded} is served no more")
