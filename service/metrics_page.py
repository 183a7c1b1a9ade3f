"""`python -m service.metrics_page > docs/metrics.md`: the page of all metrics, from where they are declared."""

from __future__ import annotations

from itertools import groupby

from models.markdown import table
from service.declarations import Declared
from service.metrics import Metrics
from service.supervisor_metrics import SupervisorMetrics

INTRODUCTION = """\
# Metrics

`http://localhost:9464/metrics` has them, for Prometheus (`metrics_port`). This page is written by
`python -m service.metrics_page` from the declarations in `service/metrics.py`; the dashboard in `deploy/grafana` draws
them, and [runbook.md](runbook.md) says what to do when an alert made of them fires.

A label holds a model, a method, a limit or a reason of the contract, never anything that a client chose. Durations have
buckets at powers of two from 8 µs on, which are bounds of native histograms, too. With `--workers` one page has the sum
of what the processes count. What one that died had counted stays in it, up to a second before its death; steps that its
clients send again, since they were not durable, count again. Of gauges it has the sum, too, but the largest of ages,
lags and load times, and one of those that every process has for all: models, parked sessions, limits; of `process_*`
one for each. Without `--workers` the lane, a process of its own all the same, has no `process_*`.

Calls have the names that gRPC servers use everywhere, so that dashboards made for those fit. `process_*` are those of
the Prometheus client: memory, processor time, open files."""


def page() -> str:
    """In Markdown, a section for each part of the service."""
    declared = list(dict.fromkeys([*Metrics().declared, *SupervisorMetrics().declared]))
    sections = [_section(name, list(metrics)) for name, metrics in groupby(declared, key=lambda d: d.section)]
    return "\n\n".join([INTRODUCTION, *sections]) + "\n"


def _section(name: str, metrics: list[Declared]) -> str:
    rows = [[f"`{m.name}`", m.kind, ", ".join(f"`{label}`" for label in m.labels), m.documentation] for m in metrics]
    return f"## {name}\n\n{table(['metric', 'type', 'labels', 'what'], rows)}"


if __name__ == "__main__":
    print(page(), end="")
