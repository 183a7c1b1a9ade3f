"""The dashboard as it stands in deploy/: what can be seen without Grafana and Prometheus."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
import yaml

from benchmarks.panels import in_cell
from service.declarations import Declared
from service.metrics import Metrics
from service.supervisor_metrics import SupervisorMetrics
from tests.support.panels import DASHBOARD, RULES, queries
from tests.support.server import ROOT

UNITS = {"none", "ops", "s", "bytes", "percentunit"}
DECLARED = {declared.name: declared for declared in [*Metrics().declared, *SupervisorMetrics().declared]}
OF_PROMETHEUS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "ALERTS"}
RULES_OF_FILE = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
RECORDED = {rule["record"] for rule in RULES_OF_FILE if "record" in rule}
METRIC = re.compile(r"\b((?:ALERTS|(?:job:rnnserve|rnnserve|grpc_server|process)_[\w:]+))(\{[^}]*\})?")
OF_ALL_MODELS = {"Live sessions of those that may be", "Steps answered later than 62.5 ms"}
"""A limit is one of all models, and so is an objective."""

ALL: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
PANELS = [panel for panel in ALL if panel["type"] != "row"]
each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


def asked(panel: dict[str, Any]) -> list[tuple[str, str]]:
    """The metrics that its queries name, and what labels these must have."""
    return [(found[1], found[2] or "") for target in panel["targets"] for found in METRIC.finditer(target["expr"])]


def declared(metric: str) -> Declared | None:
    return DECLARED.get(metric) or DECLARED.get(re.sub(r"_(bucket|sum|count)$", "", metric))


@each_panel
def test_a_panel_has_a_unit(panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS


@each_panel
def test_a_panel_asks_for_metrics_that_exist(panel: dict[str, Any]) -> None:
    assert asked(panel)
    assert [name for name, _ in asked(panel) if not declared(name) and name not in OF_PROMETHEUS | RECORDED] == []


@each_panel
def test_a_rate_is_over_a_time_that_fits_what_is_looked_at(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        assert {*re.findall(r"\brate\([^\[\]]*\[([^\]]+)\]", target["expr"])} <= {"$__rate_interval"}


@each_panel
def test_a_panel_shows_the_models_that_are_chosen(panel: dict[str, Any]) -> None:
    for name, labels in asked(panel):
        metric = declared(name)
        if metric and "model" in metric.labels and panel["title"] not in OF_ALL_MODELS:
            assert 'model=~"$model"' in labels, name


def test_the_page_of_what_was_seen_is_about_the_queries_and_rules_of_now() -> None:
    page = (ROOT / "docs" / "operations" / "panels.md").read_text()
    assert [query for query in queries() if f"`{in_cell(query.expression)}`" not in page] == []
    names = [rule.get("alert") or rule["record"] for rule in RULES_OF_FILE]
    assert [name for name in names if f"| {name} |" not in page] == []


def test_panels_do_not_lie_on_each_other() -> None:
    places = [panel["gridPos"] for panel in ALL]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


def test_every_panel_has_a_number_of_its_own() -> None:
    numbers = [panel["id"] for panel in ALL]
    assert len(numbers) == len(set(numbers))


def test_grafana_knows_where_prometheus_is_and_how_often_it_scrapes() -> None:
    provisioned = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped
