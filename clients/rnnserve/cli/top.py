"""The table of `rnnserve top`, for people and for scripts."""

import dataclasses
import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from rnnserve.cli.rates import ModelLoad, Span, Totals
from rnnserve.cli.show import NO_LABEL

Column = Literal["name", "streams", "parked", "steps", "tick", "p50", "p99", "sequences"]

_FIELDS: dict[Column, str] = {
    "steps": "steps_per_s",
    "tick": "tick_sessions",
    "p50": "p50_s",
    "p99": "p99_s",
    "sequences": "sequences_per_s",
}
_HEADINGS = ("streams", "parked", "steps/s", "tick", "p50 ms", "p99 ms", "seq/s")
_FIRST_TO_GO = ("seq/s", "parked", "tick", "p50 ms", "streams", "steps/s", "p99 ms")
"""Columns that a narrow terminal has no room for."""
_NAME_WIDTH = 12
"""As much of a name is always there."""


def chosen(models: Iterable[ModelLoad], name_part: str, sort: Column) -> list[ModelLoad]:
    """Those whose name has that part, in any case; the largest numbers first, unknown ones last, names as they come."""
    found = [model for model in models if name_part.casefold() in model.name.casefold()]
    if sort == "name":
        return found

    def number(model: ModelLoad) -> float:
        value: float | None = getattr(model, _FIELDS.get(sort, sort))
        return -math.inf if value is None else value

    return sorted(found, key=number, reverse=True)


def picture(span: Span, models: Iterable[ModelLoad]) -> Group:
    """Lines about the whole server, and one for each model; all of it fits 80 columns, and fewer have fewer."""
    totals = span.totals()
    return Group(_server(span, totals), _sessions(totals), _refusals(totals), Text(), _Table(list(models)))


def as_json(span: Span, models: Iterable[ModelLoad], url: str) -> dict[str, Any]:
    """For scripts; numbers are as in `Totals` and `ModelLoad`."""
    return {
        "metrics": url,
        "duration_s": span.duration_s,
        **dataclasses.asdict(span.totals()),
        "models": [dataclasses.asdict(model) for model in models],
    }


def _server(span: Span, totals: Totals) -> Text:
    up = "" if totals.uptime_s is None else f"up {timedelta(seconds=int(totals.uptime_s))}"
    over = "since its start" if span.since_start else f"over the last {span.duration_s:.1f} s"
    return Text(" · ".join(filter(None, [f"rnnserve {totals.server_version or ''}".strip(), up, over])), style="bold")


def _sessions(totals: Totals) -> Text:
    limit = "" if totals.stream_limit is None else f" of {totals.stream_limit:,}"
    line = Text(f"streams {totals.streams:,}{limit} · parked {totals.parked:,}")
    if totals.store_up is not None:
        line.append(" · ")
        line.append(*(("store up", "") if totals.store_up else ("store down", "bold red")))
    if totals.durable_lag_s is not None:
        line.append(f" · durable lag {totals.durable_lag_s:.2f} s")
    return line


def _refusals(totals: Totals) -> Text:
    """How many a second, and what for: those of the last interval first."""
    per_s = totals.refusals_per_s
    now = per_s or {}
    reasons = sorted(totals.refusals, key=lambda reason: (-now.get(reason, 0.0), reason))
    counts = [
        f"{reason} {totals.refusals[reason]:,}" + (f" ({_rate(now[reason])}/s)" if reason in now else "")
        for reason in reasons
    ]
    all_per_s = None if per_s is None else sum(per_s.values())
    return Text(f"refusals {_rate(all_per_s)}/s" + (f" · since the start {', '.join(counts)}" if counts else ""))


@dataclasses.dataclass
class _Table:
    """As wide as the terminal lets it be."""

    models: list[ModelLoad]

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.models:
            yield Text("no model that is served has such a name")
            return
        rows = [(model, f"v{model.version}", dict(zip(_HEADINGS, _cells(model), strict=True))) for model in self.models]
        headings, gap = list(_HEADINGS), 2
        widths = {heading: max(len(heading), *(len(cells[heading]) for _, _, cells in rows)) for heading in headings}
        fixed = _NAME_WIDTH + gap + max(len(version) for _, version, _ in rows)
        for heading in _FIRST_TO_GO:
            if fixed + sum(gap + widths[heading] for heading in headings) <= options.max_width:
                break
            headings.remove(heading)
        table = Table(box=None, header_style="bold", padding=(0, gap, 0, 0), pad_edge=False)
        table.add_column("model", min_width=_NAME_WIDTH)  # gives way first, on one line
        table.add_column("", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for model, version, cells in rows:
            name = Text(model.name, no_wrap=True, overflow="ellipsis")
            table.add_row(name, version, *(cells[heading] for heading in headings))
        yield table


def _cells(model: ModelLoad) -> list[str]:
    return [
        f"{model.streams:,}",
        f"{model.parked:,}",
        _rate(model.steps_per_s),
        _rate(model.tick_sessions),
        _ms(model.p50_s),
        _ms(model.p99_s),
        _rate(model.sequences_per_s),
    ]


def _rate(value: float | None) -> str:
    if value is None:
        return NO_LABEL
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _ms(value_s: float | None) -> str:
    if value_s is None:
        return NO_LABEL
    return f"{1e3 * value_s:.3f}" if value_s < 1e-3 else f"{1e3 * value_s:,.1f}"
