"""What Grafana would draw: every query of the dashboard, on a real Prometheus that scrapes the server under load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.panels import RULES, Query, loaded_server, queries
from tests.support.prometheus_server import Prometheus, needs_prometheus, start_prometheus
from tests.support.wire import eventually

pytestmark = [needs_prometheus, pytest.mark.xdist_group("dashboard")]

DEPEND_ON_THE_MACHINE = ("RnnserveStepsSlow", "RnnserveLoopLag")  # others may keep it so busy that these wait to fire


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With some seconds of load behind it, and more to come."""
    folder: Path = tmp_path_factory.mktemp("prometheus")
    with (
        loaded_server() as server,
        start_prometheus(folder, f"127.0.0.1:{server.metrics_port}", [RULES]) as running,
    ):
        eventually(lambda: bool(running.query("increase(rnnserve_evictions_total[30s]) > 0")))
        eventually(lambda: bool(running.query("count_over_time(rnnserve_generated_symbols_total[30s]) > 4")))
        yield running


@pytest.mark.parametrize("query", queries(), ids=lambda query: f"{query.row}, {query.panel}")
def test_a_panel_has_something_to_show(prometheus: Prometheus, query: Query) -> None:
    eventually(lambda: any(sample["value"][1] != "NaN" for sample in prometheus.query(query.expression)))


def test_all_rules_can_be_evaluated(prometheus: Prometheus) -> None:
    eventually(lambda: all(rule["health"] == "ok" for rule in prometheus.rules()))


def test_no_alert_is_on_its_way_under_a_load_that_is_healthy(prometheus: Prometheus) -> None:
    eventually(lambda: all(rule["health"] != "unknown" for rule in prometheus.rules()))
    states = {rule["name"]: rule["state"] for rule in prometheus.rules() if rule["type"] == "alerting"}
    judged = {name: state for name, state in states.items() if not name.startswith(DEPEND_ON_THE_MACHINE)}
    assert judged
    assert judged == dict.fromkeys(judged, "inactive")
