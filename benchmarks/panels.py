"""`python -m benchmarks.panels`: what each query of the dashboard gives on a Prometheus that scrapes a loaded server.

python -m benchmarks.panels --into docs/operations
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.report import machine, markdown
from tests.support.panels import RULES, loaded_server, queries
from tests.support.prometheus_server import Prometheus, start_prometheus

HEAD = ["row", "panel", "query", "series", "the first of them"]


def measure(seconds: float) -> list[list[str]]:
    """A line for each query, after so long a load."""
    with (
        tempfile.TemporaryDirectory() as folder,
        loaded_server() as server,
        start_prometheus(Path(folder), f"127.0.0.1:{server.metrics_port}", [RULES]) as prometheus,
    ):
        for _ in track(range(int(seconds)), "load", console=Console(stderr=True)):
            time.sleep(1)
        lines = [[q.row, q.panel, f"`{in_cell(q.expression)}`", *_shown(prometheus, q.expression)] for q in queries()]
        return lines + [
            ["rules", rule["name"], f"`{in_cell(rule['query'])}`", *_rule(rule)] for rule in prometheus.rules()
        ]


def _shown(prometheus: Prometheus, expression: str) -> list[str]:
    """How many series, and the value of one of them that is a number."""
    found = [(sample["metric"], float(sample["value"][1])) for sample in prometheus.query(expression)]
    numbers = [(labels, value) for labels, value in found if math.isfinite(value)]
    labels, value = numbers[0] if numbers else ({}, math.nan)
    name = ", ".join(f"{value}" for key, value in labels.items() if key not in ("__name__", "instance", "job"))
    return [str(len(found)), f"{name}: {value:.4g}" if name else f"{value:.4g}"]


def _rule(rule: dict[str, Any]) -> list[str]:
    return [rule["health"], rule.get("state", "recorded")]


def in_cell(expression: str) -> str:
    """As it stands in a table."""
    return expression.replace("|", "\\|")


def main() -> None:
    """Measure, print the page, and write it if a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of load before the queries")
    parser.add_argument("--into", type=Path, help="folder of the page")
    given = parser.parse_args()
    page = f"""\
# Every query of the dashboard, under load

`python -m benchmarks.panels --seconds {given.seconds:g}` on {machine()}: streams, multiplexed sessions, whole
sequences and outputs of the trained bundles, some refused, left, resumed and evicted, scraped each second. How many
series each query gives, and one of them; then the rules, whether they can be evaluated, and which alerts fire: none
may.

{markdown(HEAD, measure(given.seconds))}
"""
    print(page)
    if given.into:
        given.into.mkdir(parents=True, exist_ok=True)
        (given.into / "panels.md").write_text(page)


if __name__ == "__main__":
    main()
