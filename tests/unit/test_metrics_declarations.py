"""docs/metrics.md, and what the declarations promise of labels and buckets."""

from __future__ import annotations

import math

import pytest

from service.declarations import DURATION_BUCKETS_S
from service.metrics import Metrics
from service.metrics_page import page
from service.supervisor_metrics import SupervisorMetrics
from tests.support.server import ROOT

BOUNDED = {
    "grpc_type", "grpc_service", "grpc_method", "grpc_code", "model", "version", "reason", "limit", "operation",
    "finish", "process", "store", "why", "torch", "python",
}  # fmt: skip
"""Labels whose values the service knows beforehand."""


def test_the_page_of_metrics_is_what_is_declared() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == page()


def test_every_metric_of_a_process_is_on_the_page() -> None:
    text = page()
    for registry in (Metrics().registry, SupervisorMetrics().registry):
        for family in registry.collect():
            if not family.name.startswith("process_"):
                name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
                assert f"`{name}`" in text


@pytest.mark.parametrize(("max_streams", "max_sessions"), [(3, 100), (100, 3)])
def test_the_limit_of_live_sessions_is_the_one_that_is_met_first(max_streams: int, max_sessions: int) -> None:
    metrics = Metrics()
    metrics.settings(max_streams=max_streams, max_sessions=max_sessions, checkpoint_interval_s=1.0)
    assert metrics.registry.get_sample_value("rnnserve_session_limit") == 3


def test_labels_are_bounded() -> None:
    for metric in [*Metrics().declared, *SupervisorMetrics().declared]:
        assert set(metric.labels) <= BOUNDED, metric.name


def test_buckets_reach_from_microseconds_to_minutes_at_bounds_of_native_histograms() -> None:
    assert DURATION_BUCKETS_S[0] < 10e-6
    assert DURATION_BUCKETS_S[-1] > 300
    assert all(math.log2(bound).is_integer() for bound in DURATION_BUCKETS_S)
