"""Declares the metrics of a registry, and remembers them for docs/metrics.md."""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

from service.tallies import TallyCounter, TallyHistogram

disable_created_metrics()  # when each was first counted: nothing asks for it

DURATION_BUCKETS_S = (*(2.0**exponent for exponent in range(-17, 5)), 64.0, 512.0)
"""From 8 µs on. Powers of two are bounds of Prometheus' native histograms, too, so both kinds say the same."""
RESTARTS = (
    "rnnserve_process_restarts_total",
    "Processes started again: they died, were stuck, failed to start, or were rolled by SIGHUP.",
    ("process", "why"),
)
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Declared(NamedTuple):
    """A metric: the part of the service that it is about, and what Prometheus is told of it."""

    section: str
    name: str
    kind: str
    documentation: str
    labels: tuple[str, ...]


class Declarations:
    """One registry. `section` is that of the metrics that are declared next."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.declared: list[Declared] = []
        self.section = ""

    def counter(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, self._declare(name, "counter", documentation, labels), labels, registry=self.registry)

    def gauge(self, name: str, documentation: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, self._declare(name, "gauge", documentation, labels), labels, registry=self.registry)

    def info(self, name: str, documentation: str, values: dict[str, str]) -> None:
        """Always 1; the values are its labels."""
        info = Info(name, self._declare(f"{name}_info", "gauge", documentation, tuple(values)), registry=self.registry)
        info.info(values)

    def histogram(
        self,
        name: str,
        documentation: str,
        labels: tuple[str, ...] = (),
        buckets: tuple[float, ...] = DURATION_BUCKETS_S,
    ) -> Histogram:
        documentation = self._declare(name, "histogram", documentation, labels)
        return Histogram(name, documentation, labels, registry=self.registry, buckets=buckets)

    def tally(self, name: str, documentation: str, labels: tuple[str, ...]) -> TallyCounter:
        """A counter for what every step counts."""
        return TallyCounter(name, self._declare(name, "counter", documentation, labels), labels, self.registry)

    def tally_histogram(
        self, name: str, documentation: str, labels: tuple[str, ...], buckets: tuple[float, ...] = DURATION_BUCKETS_S
    ) -> TallyHistogram:
        """A histogram for what every step observes."""
        documentation = self._declare(name, "histogram", documentation, labels)
        return TallyHistogram(name, documentation, labels, self.registry, buckets)

    def _declare(self, name: str, kind: str, documentation: str, labels: tuple[str, ...]) -> str:
        self.declared.append(Declared(self.section, name, kind, documentation, labels))
        return documentation
