"""What a server does, from two readings of its metrics: rates, means and quantiles of what was between them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rnnserve.metrics_page import Page


@dataclass(frozen=True)
class Reading:
    """What the server said at a time."""

    models: tuple[tuple[str, int], ...]
    """Names and versions of what it serves."""
    page: Page
    at_s: float
    """By a clock that never goes back."""
    uptime_s: float | None
    """Since the start of the server's oldest process; None where the page does not say."""


@dataclass(frozen=True)
class ModelLoad:
    """What a version of a model does. None where nothing is known, as of the latency of steps while there are none."""

    name: str
    version: int
    streams: int
    parked: int
    """Sessions without a stream."""
    steps_per_s: float | None
    """Of streams, and symbols of outputs that are written."""
    tick_sessions: float | None
    """Mean over the ticks."""
    p50_s: float | None
    """From a message of steps to its answer, which half of them take at most."""
    p99_s: float | None
    sequences_per_s: float | None
    """Whole ones."""


@dataclass(frozen=True)
class Totals:
    """What the whole server does. None where the page does not say."""

    server_version: str | None
    uptime_s: float | None
    streams: int
    stream_limit: int | None
    parked: int
    store_up: bool | None
    durable_lag_s: float | None
    refusals_per_s: dict[str, float] | None
    """By reason, without those that did not occur."""
    refusals: dict[str, int]
    """The same, since the server's start."""


def increase(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """How much related counters have grown. If one has fallen, the server has begun anew, and all of them from 0."""
    if any(now.get(key, 0.0) < value for key, value in before.items()):
        return dict(now)
    return {key: value - before.get(key, 0.0) for key, value in now.items()}


def quantile(share: float, up_to: Mapping[float, float]) -> float | None:
    """What that share of the values does not exceed, as PromQL's histogram_quantile tells it: even within a bucket.

    Args:
        share: above 0, at most 1.
        up_to: for the upper bound of each bucket, infinity among them, how many values do not exceed it.

    Returns:
        The last finite bound where it lies beyond; None where there are no values.
    """
    rank = share * up_to.get(math.inf, 0.0)
    lower, below = 0.0, 0.0
    for upper in sorted(up_to) if rank else ():
        if up_to[upper] >= rank:
            return lower if math.isinf(upper) else lower + (upper - lower) * (rank - below) / (up_to[upper] - below)
        lower, below = upper, up_to[upper]
    return None


class Span:
    """From one reading to the next; from the server's start, where there is none before."""

    def __init__(self, now: Reading, before: Reading | None) -> None:
        self._now = now
        self._before = Page() if before is None else before.page
        self.since_start = before is None
        self.duration_s = now.uptime_s if before is None else now.at_s - before.at_s
        """None where it is not known how long the server runs."""

    def models(self) -> list[ModelLoad]:
        """In the order of the reading."""
        return [self._model(name, version) for name, version in self._now.models]

    def totals(self) -> Totals:
        grown = self._grown("rnnserve_refusals_total", {}, by="reason")
        counts = self._now.page.by("reason", "rnnserve_refusals_total", {})
        limit, store_up = self._gauge("rnnserve_session_limit"), self._gauge("rnnserve_store_up")
        builds = self._now.page.samples("rnnserve_build_info", {})
        return Totals(
            server_version=builds[0].labels.get("version") if builds else None,
            uptime_s=self._now.uptime_s,
            streams=int(self._gauge("rnnserve_sessions") or 0),
            stream_limit=None if limit is None else int(limit),
            parked=int(self._gauge("rnnserve_parked_sessions") or 0),
            store_up=None if store_up is None else bool(store_up),
            durable_lag_s=self._gauge("rnnserve_durable_lag_seconds"),
            refusals_per_s=_per_s(grown, self.duration_s),
            refusals={reason: int(count) for reason, count in counts.items() if count},
        )

    def _model(self, name: str, version: int) -> ModelLoad:
        labels = {"model": name, "version": str(version)}
        ticks, sessions = (self._sum(f"rnnserve_tick_sessions_{part}", labels) for part in ("count", "sum"))
        buckets = self._grown("rnnserve_step_seconds_bucket", labels, by="le")
        up_to = {float(bound): count for bound, count in buckets.items()}
        return ModelLoad(
            name=name,
            version=version,
            streams=int(self._gauge("rnnserve_sessions", labels) or 0),
            parked=int(self._gauge("rnnserve_parked_sessions", labels) or 0),
            steps_per_s=_rate(
                self._sum("rnnserve_steps_total", labels) + self._sum("rnnserve_generated_symbols_total", labels),
                self.duration_s,
            ),
            tick_sessions=sessions / ticks if ticks else None,
            p50_s=quantile(0.5, up_to),
            p99_s=quantile(0.99, up_to),
            sequences_per_s=_rate(self._sum("rnnserve_sequences_total", labels), self.duration_s),
        )

    def _gauge(self, name: str, labels: Mapping[str, str] | None = None) -> float | None:
        """Of all that have the labels together; None where there is none."""
        found = self._now.page.samples(name, labels or {})
        return sum(sample.value for sample in found) if found else None

    def _sum(self, name: str, labels: Mapping[str, str]) -> float:
        return sum(self._grown(name, labels).values())

    def _grown(self, name: str, labels: Mapping[str, str], by: str = "") -> dict[str, float]:
        return increase(self._now.page.by(by, name, labels), self._before.by(by, name, labels))


def _rate(count: float, duration_s: float | None) -> float | None:
    return count / duration_s if duration_s else None


def _per_s(counts: Mapping[str, float], duration_s: float | None) -> dict[str, float] | None:
    return {key: count / duration_s for key, count in counts.items() if count} if duration_s else None
