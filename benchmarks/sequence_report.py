"""What `make bench-sequences` says of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.network import FEATURES, HIDDEN_SIZE
from benchmarks.peers import NAMES as PEERS
from benchmarks.plots import Latencies, draw_latencies, draw_sequences
from benchmarks.report import machine, markdown
from benchmarks.sequence_load import LONGEST, Turn
from benchmarks.turns import BOTTLENECK, busy

LAYERS = 2
BFLOAT16 = "rnnserve, bfloat16"
OURS, PADDED, BUCKETED, PRODUCTS = "rnnserve", "padded", "bucketed", "products"
PERCENTILES = (50, 90, 99)
BOUNDS = (20, 80, 320, LONGEST)
CLASSES = tuple(zip((1, *(bound + 1 for bound in BOUNDS)), BOUNDS, strict=False))
"""Of lengths: the least and the most steps."""
KEPT_UP = 0.9
"""What a server has answered at the least, of the steps offered, if it did not fall behind."""
Table = tuple[list[str], list[list[str]]]
"""Its head and its lines."""


@dataclass
class Row:
    """What one server did at one load."""

    server: str
    lengths: str
    in_flight: int = 0
    share: float = 0.0  # of the bucketed server's steps/s
    turns: list[Turn] = field(default_factory=list)

    @property
    def load(self) -> tuple[str, str]:
        """Lengths, and how many of them."""
        return self.lengths, f"{self.in_flight} in flight" if self.in_flight else f"{self.share:.0%} of bucketed"

    def steps_per_s(self) -> list[float]:
        return [sum(one.steps for one in turn.answered) / turn.seconds for turn in self.turns]

    def sequences_per_s(self) -> list[float]:
        return [len(turn.answered) / turn.seconds for turn in self.turns]

    def offered_per_s(self) -> list[float]:
        return [len(turn.offered) / turn.seconds for turn in self.turns]

    def client_core(self) -> float:
        return median(turn.client_core for turn in self.turns)

    def latencies_ms(self, percentile: float) -> list[float]:
        """Of each turn."""
        return [self._percentile([turn], percentile, 1, LONGEST) for turn in self.turns]

    def latency_ms(self, percentile: float, least: int = 1, most: int = LONGEST) -> float:
        """Of all turns, of sequences of so many steps; NaN if there was none."""
        return self._percentile(self.turns, percentile, least, most)

    def _percentile(self, turns: Sequence[Turn], percentile: float, least: int, most: int) -> float:
        sequences = [one for turn in turns for one in (turn.offered if self.share else turn.answered)]
        latencies_s = [one.answered_s - one.due_s for one in sequences if least <= one.steps <= most]
        return float(np.percentile(latencies_s, percentile)) * 1e3 if latencies_s else float("nan")

    @property
    def falls_behind(self) -> bool:
        """In open loop: fewer steps are answered than are offered."""
        offered = [sum(one.steps for one in turn.offered) / turn.seconds for turn in self.turns]
        return bool(self.share) and median(map(_divided, self.steps_per_s(), offered)) < KEPT_UP


def _divided(over: float, under: float) -> float:
    return over / under if under else float("nan")


def ratio(over: Row, under: Row, figures: Callable[[Row], Sequence[float]] = Row.steps_per_s) -> float:
    """The median of the turns' ratios: the lengths differ from turn to turn."""
    return median(map(_divided, figures(over), figures(under)))


def best_peer(rows: Sequence[Row]) -> Row | None:
    """Of those at one load: in closed loop the fastest one, in open loop that with the least p90 which keeps up."""
    peers = [row for row in rows if row.server in PEERS and not row.falls_behind]
    if not peers:
        return None
    if peers[0].share:
        return min(peers, key=lambda row: median(row.latencies_ms(90)))
    return max(peers, key=lambda row: median(row.steps_per_s()))


def closed_table(rows: Sequence[Row]) -> Table:
    """Of all rows in closed loop."""
    head = ["lengths", "in flight", "server", "sequences/s", "÷ products", "rnnserve ÷ it", "p50 ms", "p99 ms"]
    head += ["client"]
    by_name = {(row.load, row.server): row for row in rows if row.in_flight}
    lines = []
    for (load, name), row in by_name.items():
        values = row.sequences_per_s()
        products, ours = by_name.get((load, PRODUCTS)), by_name.get((load, OURS))
        timed = [f"{row.latency_ms(50):.1f}", f"{row.latency_ms(99):.1f}", busy(row.client_core())]
        lines.append([
            row.lengths, str(row.in_flight), name, f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})",
            f"{ratio(row, products):.2f}" if products else "", f"{ratio(ours, row):.2f}" if ours else "",
            *(["", "", ""] if name == PRODUCTS else timed),
        ])  # fmt: skip
    return head, lines


def open_table(rows: Sequence[Row]) -> Table:
    """Of all rows in open loop."""
    head = ["lengths", "offered ÷ bucketed", "server", "offered/s", "answered/s", "unanswered at the end"]
    head += [f"p{percentile} ms" for percentile in PERCENTILES]
    head += [*(f"p90 ms, {least}–{most} steps" for least, most in CLASSES), "client"]
    lines = []
    for row in rows:
        if row.share:
            unanswered, offered = (sum(counts) for counts in zip(*map(_counts, row.turns), strict=True))
            behind = " falls behind" if row.falls_behind else ""
            lines.append([
                row.lengths, f"{row.share:.0%}", row.server, f"{median(row.offered_per_s()):,.0f}",
                f"{median(row.sequences_per_s()):,.0f}{behind}", f"{unanswered:,} of {offered:,}",
                *(f"{row.latency_ms(percentile):,.0f}" for percentile in PERCENTILES),
                *(f"{row.latency_ms(90, *bounds):,.0f}".replace("nan", "") for bounds in CLASSES),
                busy(row.client_core()),
            ])  # fmt: skip
    return head, lines


def _counts(turn: Turn) -> tuple[int, int]:
    return turn.unanswered, len(turn.offered)


def compared_table(rows: Sequence[Row]) -> Table:
    """A line for each load: rnnserve's figure ÷ that of the others; of the peers the best one."""
    head = ["server", "lengths", "load", "figure", "÷ products", "÷ padded", "÷ bucketed", "÷ best peer"]
    lines = []
    for row in rows:
        if row.server not in (OURS, BFLOAT16):
            continue
        beside = [other for other in rows if other.load == row.load]
        by_name = {other.server: other for other in beside}
        best = best_peer(beside)
        others = [*(by_name.get(name) for name in (PRODUCTS, PADDED, BUCKETED)), best]
        cells = [_compared(row, other) for other in others]
        if best:
            cells[-1] += f" ({best.server})"
        lines.append([row.server, *row.load, "p90" if row.share else "steps/s", *cells])
    return head, lines


def _compared(ours: Row, other: Row | None) -> str:
    if other is None:
        return ""
    for row in (ours, other):
        if row.falls_behind:
            return f"{row.server} falls behind"
    return f"{ratio(ours, other, _p90_ms if ours.share else Row.steps_per_s):.2f}"


def _p90_ms(row: Row) -> list[float]:
    return row.latencies_ms(90)


def percentiles_of(rows: Sequence[Row], title: str) -> Latencies:
    """Of rows at one load."""
    values_ms = {row.server: [row.latency_ms(percentile) for percentile in PERCENTILES] for row in rows}
    ticks = [f"p{percentile}" for percentile in PERCENTILES]
    return Latencies(title, "percentile", ticks, values_ms, [row.server for row in rows if row.falls_behind])


def classes_of(rows: Sequence[Row], title: str) -> Latencies:
    """p90 by class of length, of rows at one load."""
    values_ms = {row.server: [row.latency_ms(90, *bounds) for bounds in CLASSES] for row in rows}
    ticks = [f"{least}–{most}" for least, most in CLASSES]
    behind = [row.server for row in rows if row.falls_behind]
    return Latencies(f"{title}: p90", "steps of a sequence", ticks, values_ms, behind)


def latency_panels(rows: Sequence[Row]) -> dict[str, list[Latencies]]:
    """By distribution of lengths, one for each share that is offered: by class of length where these differ much."""
    panels: dict[str, list[Latencies]] = {}
    for load in dict.fromkeys(row.load for row in rows if row.share):
        beside = [row for row in rows if row.load == load]
        lengths, offered = load
        of = classes_of if lengths == "heavy-tailed" else percentiles_of
        panels.setdefault(lengths, []).append(of(beside, f"{lengths} lengths, {offered} offered"))
    return panels


def kept(row: Row) -> dict[str, Any]:
    """For sequences.json."""
    data = {name: getattr(row, name) for name in ("server", "lengths", "in_flight", "share")}
    data |= {"sequences_per_s": row.sequences_per_s(), "steps_per_s": row.steps_per_s()}
    if row.server != PRODUCTS:
        data |= {f"p{percentile}_ms": row.latency_ms(percentile) for percentile in PERCENTILES}
        data |= {"client_core": row.client_core()}
    if row.share:
        data |= {"offered_per_s": row.offered_per_s(), "unanswered": [turn.unanswered for turn in row.turns]}
        data |= {"falls_behind": row.falls_behind}
    return data


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "Closed loop: sequences/s, medians over the turns (least–most)": closed_table,
    "Open loop: latency from the moment that a sequence was due": open_table,
    "rnnserve ÷ the others": compared_table,
}
READ_AS = f"""
Closed loop: so many sequences in flight. Open loop: they come at random moments, as many as make such a share of the
steps/s of the bucketed server in closed loop, whether or not those before are answered. All are waited for; those are
counted that had no answer when the turn was over, of which some had just come. A server falls behind if it answers less
than {KEPT_UP:.0%} of the steps offered; its latencies grow with the turn, and its points are hollow. The best peer is
the fastest in closed loop, and in open loop the one with the least p90 of those that keep up. The client is the
bottleneck where it is busy for more than {BOTTLENECK:.0%} of its core.
"""
"""Said in the report."""


def write(folder: Path, rows: Sequence[Row], failed: dict[str, str], command: str, packages: Sequence[str]) -> None:
    """sequences.json, sequences.md and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"command": command, "machine": machine(), "failed": failed, "rows": [kept(row) for row in rows]}
    (folder / "sequences.json").write_text(json.dumps(data, indent=1) + "\n")
    draw_sequences(folder / "sequences.svg", [row for row in rows if not row.share], PRODUCTS)
    plots = {closed_table: "sequences.svg"}
    if panels := latency_panels(rows):
        draw_latencies(folder / "sequences_latency.svg", panels)
        plots[open_table] = "sequences_latency.svg"
    network = f"Bidirectional LSTM of {LAYERS} layers, {FEATURES} features, {HIDDEN_SIZE} units"
    parts = [
        "# What `make bench-sequences` has measured", f"`{command}` on {machine()}.",
        f"{network}; {', '.join(['the same random weights for all', *packages])}. Servers run on one core, the client "
        "on another; medians over the turns.", " ".join(READ_AS.split()),
    ]  # fmt: skip
    for title, table in TABLES.items():
        parts += [f"## {title}", markdown(*table(rows)), *([f"![]({plots[table]})"] if table in plots else [])]
    parts += [f"- {name} {reason}" for name, reason in failed.items()]
    (folder / "sequences.md").write_text("\n\n".join(parts) + "\n")
