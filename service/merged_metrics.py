"""One page of metrics for all processes of a service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

SUMMED = ("counter", "histogram", "summary")
SAME_EVERYWHERE = (  # each knows of all
    "rnnserve_parked_sessions", "rnnserve_parked_bytes", "rnnserve_models", "rnnserve_session_limit",
    "rnnserve_checkpoint_interval_seconds",
)  # fmt: skip
FLAGS = ("rnnserve_store_up",)  # down for one is down for all
LARGEST = (
    "rnnserve_step_queue_age_seconds", "rnnserve_sequence_queue_age_seconds", "rnnserve_durable_lag_seconds",
    "rnnserve_loop_lag_seconds", "rnnserve_model_load_seconds",
)  # fmt: skip

Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and labels."""
Values: TypeAlias = Mapping[Key, float]


class Snapshot(NamedTuple):
    """The pages of the processes that live, by their names, and what those had counted that do not."""

    pages: Mapping[str, str]
    of_dead: Values


class MergedMetrics(Collector):
    """Adds up what the processes count. What a dead one has counted stays, its gauges go."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        pages, of_dead = self._snapshot()
        families: dict[str, list[Metric]] = {}
        processes: list[Metric] = []
        for name, page in pages.items():
            for family in text_string_to_metric_families(page):
                if family.name.startswith("process_"):
                    processes.append(_labelled(family, name))
                else:
                    families.setdefault(family.name, []).append(family)
        yield from (_merged(same, of_dead) for same in families.values())
        yield from _joined(processes)


def counted(before: Values, page: str) -> Values:
    """What was counted before, and on the last page of a process that is dead."""
    values = dict(before)
    for family in text_string_to_metric_families(page):
        if family.type in SUMMED and not family.name.startswith("process_"):
            _combine(values, family, _sum)
    return values


def registry_of(*collectors: Collector) -> CollectorRegistry:
    """With these alone."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return registry


def _merged(same: list[Metric], of_dead: Values) -> Metric:
    first = same[0]
    values: dict[Key, float] = {}
    if first.type in SUMMED:
        values |= {key: value for key, value in of_dead.items() if _is_of(first, key[0])}
    for family in same:
        _combine(values, family, _rule(first))
    merged = Metric(first.name, first.documentation, first.type)
    for (name, labels), value in values.items():
        merged.add_sample(name, dict(labels), value)
    return merged


def _rule(family: Metric) -> Callable[[float, float], float]:
    if family.name in FLAGS:
        return min
    if family.name in (*SAME_EVERYWHERE, *LARGEST) or family.name.endswith("_info"):
        return max
    return _sum


def _sum(a: float, b: float) -> float:
    return a + b


def _is_of(family: Metric, sample: str) -> bool:
    return sample in {family.name, *(f"{family.name}_{end}" for end in ("total", "count", "sum", "bucket"))}


def _combine(values: dict[Key, float], family: Metric, combine: Callable[[float, float], float]) -> None:
    for sample in family.samples:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        values[key] = combine(values[key], sample.value) if key in values else sample.value


def _labelled(family: Metric, process: str) -> Metric:
    labelled = Metric(family.name, family.documentation, family.type)
    for sample in family.samples:
        labelled.add_sample(sample.name, {**sample.labels, "process": process}, sample.value)
    return labelled


def _joined(families: Iterable[Metric]) -> Iterable[Metric]:
    """Each name once."""
    by_name: dict[str, Metric] = {}
    for family in families:
        if family.name in by_name:
            by_name[family.name].samples.extend(family.samples)
        else:
            by_name[family.name] = family
    return by_name.values()
