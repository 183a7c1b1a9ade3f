"""One page of metrics for several processes: what is counted adds up, and never goes back."""

from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.merged_metrics import MergedMetrics, Snapshot, Values, counted, registry_of


def page(steps: int, sessions: int, *latencies_s: float, parked: int = 7, store_up: int = 1) -> str:
    """Of a process that has done so much."""
    registry = CollectorRegistry()
    Counter("rnnserve_steps_total", "Steps.", ["model"], registry=registry).labels("a").inc(steps)
    Gauge("rnnserve_sessions", "Live.", registry=registry).set(sessions)
    Gauge("rnnserve_parked_sessions", "Parked.", registry=registry).set(parked)
    Gauge("rnnserve_store_up", "Whether.", registry=registry).set(store_up)
    waits = Histogram("rnnserve_wait_seconds", "Waits.", buckets=(0.1, 1.0), registry=registry)
    for latency_s in latencies_s:
        waits.observe(latency_s)
    return generate_latest(registry).decode()


def samples(pages: Mapping[str, str], of_dead: Values | None = None) -> dict[str, float]:
    """What a scrape gets: name{label=value} -> value."""
    text = generate_latest(registry_of(MergedMetrics(lambda: Snapshot(pages, of_dead or {})))).decode()
    return {
        sample.name + "".join(f"{{{name}={value}}}" for name, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_the_processes_count_adds_up() -> None:
    found = samples({"worker-0": page(3, 2, 0.05, 0.5), "worker-1": page(4, 1, 0.05)})
    assert found["rnnserve_steps_total{model=a}"] == 7
    assert found["rnnserve_sessions"] == 3
    assert found["rnnserve_wait_seconds_bucket{le=0.1}"] == 2
    assert found["rnnserve_wait_seconds_bucket{le=+Inf}"] == found["rnnserve_wait_seconds_count"] == 3
    assert found["rnnserve_wait_seconds_sum"] == pytest.approx(0.6)


def test_what_each_process_knows_of_all_is_counted_once() -> None:
    assert samples({"worker-0": page(0, 0), "worker-1": page(0, 0)})["rnnserve_parked_sessions"] == 7


def test_a_store_that_is_down_for_one_process_is_down() -> None:
    assert samples({"worker-0": page(0, 0), "worker-1": page(0, 0, store_up=0)})["rnnserve_store_up"] == 0


def test_what_a_dead_process_had_counted_stays_and_its_gauges_go() -> None:
    of_dead = counted(counted({}, page(3, 5, 0.05)), page(2, 5, 0.5))
    found = samples({"worker-0": page(1, 2)}, of_dead)
    assert found["rnnserve_steps_total{model=a}"] == 6
    assert found["rnnserve_sessions"] == 2
    assert found["rnnserve_wait_seconds_bucket{le=0.1}"] == 1
    assert found["rnnserve_wait_seconds_count"] == 2


def test_what_is_of_a_process_is_told_for_each() -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    text = generate_latest(registry).decode()
    found = samples({"worker-0": text, "supervisor": text})
    one, other = (found[f"process_start_time_seconds{{process={name}}}"] for name in ("worker-0", "supervisor"))
    assert one == other > 0
