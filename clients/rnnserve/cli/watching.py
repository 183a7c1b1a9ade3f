"""The command that watches a server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic, sleep, time
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from rnnserve.cli import show
from rnnserve.cli.options import Options
from rnnserve.cli.outcome import BadInput, exit_codes, stdout
from rnnserve.cli.rates import ModelLoad, Reading, Span
from rnnserve.cli.scrape import checked_url, default_url, fetch
from rnnserve.cli.top import Column, as_json, chosen, picture
from rnnserve.client import Client
from rnnserve.errors import RnnserveError

_PATIENCE_S = 5.0
"""Whoever watches wants to see soon that a server does not answer."""

Show = Callable[[RenderableType], None]


def top(
    context: typer.Context,
    metrics: Annotated[
        str | None, typer.Option(help="URL of the metrics page; else port 9464 of the target's host.", metavar="URL")
    ] = None,
    sort: Annotated[Column, typer.Option(help="By which column: names rising, numbers falling.")] = "name",
    name_part: Annotated[str, typer.Option("--filter", help="Only models with this in their name.")] = "",
    interval_s: Annotated[float, typer.Option(help="Seconds from reading to reading.", min=0.1, max=3600)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print what one interval brings, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --once: one JSON object.")] = False,
) -> None:
    """What the server does, model by model, until Ctrl-C: streams, steps, latencies, whole sequences, refusals."""
    options: Options = context.obj
    with exit_codes():
        as_object = json or options.json
        if as_object and not once:
            raise BadInput("--json prints a single reading: it needs --once")
        url = checked_url(default_url(options.target) if metrics is None else metrics)
        choose = partial(chosen, name_part=name_part, sort=sort)
        if once:
            with options.client() as client:
                _print_once(_Server(client, url, options.timeout_s), interval_s, choose, as_object)
        else:
            hasty = replace(options, timeout_s=min(options.timeout_s, _PATIENCE_S))
            with suppress(KeyboardInterrupt), hasty.client() as client, _screen(stdout) as show_now:
                _watch(_Server(client, url, hasty.timeout_s), interval_s, choose, show_now)


Choose = Callable[[list[ModelLoad]], list[ModelLoad]]
"""Which models are shown, and in which order."""


@dataclass(frozen=True)
class _Server:
    """What is asked for a reading."""

    client: Client
    url: str
    timeout_s: float

    def read(self) -> Reading:
        """Raises RnnserveError."""
        page, at_s = fetch(self.url, self.timeout_s), monotonic()
        models = tuple((model.name, model.version) for model in self.client.models())
        started_at = [process.value for process in page.samples("process_start_time_seconds", {})]
        uptime_s = max(time() - min(started_at), 0.0) if started_at else None
        return Reading(models, page, at_s, uptime_s)


def _print_once(server: _Server, interval_s: float, choose: Choose, as_object: bool) -> None:
    before = server.read()
    sleep(interval_s)
    span = Span(server.read(), before)
    models = choose(span.models())
    if as_object:
        show.print_json(as_json(span, models, server.url))
    else:
        stdout.print(picture(span, models))


def _watch(server: _Server, interval_s: float, choose: Choose, show_now: Show) -> None:
    """Raises RnnserveError if the first reading fails; later ones are tried again, for a server may come back."""
    last, before = server.read(), None
    while True:
        span = Span(last, before)
        shown = picture(span, choose(span.models()))
        show_now(shown)
        before = last
        last = _next_reading(server, interval_s, partial(_show_failure, show_now, shown))


def _next_reading(server: _Server, interval_s: float, failed: Callable[[RnnserveError], None]) -> Reading:
    while True:
        sleep(interval_s)
        try:
            return server.read()
        except RnnserveError as error:
            failed(error)


def _show_failure(show_now: Show, last_shown: Group, error: RnnserveError) -> None:
    """Above what was last known."""
    show_now(Group(Text(f"{error.message}; trying again", style="bold red"), last_shown))


@contextmanager
def _screen(console: Console) -> Iterator[Show]:
    """Draws each picture over the last one; where there is no terminal, below it."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield partial(live.update, refresh=True)
    else:
        yield console.print
