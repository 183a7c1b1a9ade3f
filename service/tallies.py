"""A counter and a histogram for what every step counts: those of prometheus_client take a lock and 1 to 3 µs a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

Labels = tuple[str | int, ...]


class TallyCounter(Collector):
    """Counted by one thread at a time, read by any."""

    def __init__(self, name: str, documentation: str, labelnames: tuple[str, ...], registry: CollectorRegistry) -> None:
        self._declared = name, documentation, None, labelnames
        self._counts: dict[Labels, int] = {}
        registry.register(self)

    def inc(self, labels: Labels, amount: int = 1) -> None:
        self._counts[labels] = self._counts.get(labels, 0) + amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(*self._declared)
        for labels, count in self._counts.copy().items():
            family.add_metric([str(label) for label in labels], count)
        yield family

    describe = collect  # so that its name is taken, and can be asked for alone


class _Observed:
    """With one set of labels: how many in each bucket, the last one without a bound, and their sum."""

    __slots__ = ("counts", "sum")

    def __init__(self, buckets: int) -> None:
        self.counts = [0] * buckets
        self.sum = 0.0


class TallyHistogram(Collector):
    """Observed by one thread at a time, read by any. buckets: upper bounds, rising, without infinity."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labelnames: tuple[str, ...],
        registry: CollectorRegistry,
        buckets: tuple[float, ...],
    ) -> None:
        self._declared = name, documentation, None, None, labelnames
        self._buckets = buckets
        self._observed: dict[Labels, _Observed] = {}
        registry.register(self)

    def observe(self, labels: Labels, value: float) -> None:
        observed = self._observed.get(labels)
        if observed is None:
            observed = self._observed[labels] = _Observed(len(self._buckets) + 1)
        observed.counts[bisect_left(self._buckets, value)] += 1
        observed.sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(*self._declared)
        bounds = [str(float(bound)) for bound in self._buckets] + ["+Inf"]
        for labels, observed in self._observed.copy().items():
            up_to = list(accumulate(observed.counts))
            family.add_metric(
                [str(label) for label in labels], list(zip(bounds, up_to, strict=True)), sum_value=observed.sum
            )
        yield family

    describe = collect  # so that its name is taken, and can be asked for alone
