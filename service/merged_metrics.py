"""One page of metrics for all processes of a service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

SUMMED = ("counter", "histogram", "summary")
SAME_EVERYWHERE = ("rnnserve_parked_sessions", "rnnserve_parked_bytes")  # each process counts those of all
FLAGS = ("rnnserve_store_up",)  # down for one is down for all

Key = tuple[str, tuple[tuple[str, str], ...]]
Values = dict[Key, float]


class MergedMetrics(Collector):
    """Adds up what the processes count. What a dead one has counted stays, its gauges go."""

    def __init__(self, pages: Callable[[], Mapping[str, str]]) -> None:
        """`pages` gives the exposition text of each process that lives, by its name."""
        self._pages = pages
        self._of_dead: Values = {}

    def bury(self, page: str) -> None:
        """The last page of a process that is dead."""
        for family in text_string_to_metric_families(page):
            if family.type in SUMMED and not family.name.startswith("process_"):
                _add(self._of_dead, family)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, list[Metric]] = {}
        processes: list[Metric] = []
        for name, page in self._pages().items():
            for family in text_string_to_metric_families(page):
                if family.name.startswith("process_"):
                    processes.append(_labelled(family, name))
                else:
                    families.setdefault(family.name, []).append(family)
        yield from (self._merged(same) for same in families.values())
        yield from _joined(processes)

    def _merged(self, same: list[Metric]) -> Metric:
        first = same[0]
        merged = Metric(first.name, first.documentation, first.type)
        values: Values = {}
        if first.type in SUMMED:
            values |= {key: value for key, value in self._of_dead.items() if _is_of(first, key[0])}
        for family in same:
            if first.name in FLAGS:
                _combine(values, family, min)
            elif first.name in SAME_EVERYWHERE or first.type == "info" or first.name.endswith("_info"):
                _combine(values, family, max)
            else:
                _add(values, family)
        for (name, labels), value in values.items():
            if not name.endswith("_created"):
                merged.add_sample(name, dict(labels), value)
        return merged


def registry_of(*collectors: Collector) -> CollectorRegistry:
    """With these alone."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return registry


def _is_of(family: Metric, sample: str) -> bool:
    return sample in {family.name, *(f"{family.name}_{end}" for end in ("total", "count", "sum", "bucket"))}


def _add(values: Values, family: Metric) -> None:
    _combine(values, family, lambda a, b: a + b)


def _combine(values: Values, family: Metric, combine: Callable[[float, float], float]) -> None:
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
