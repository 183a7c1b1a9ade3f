"""Alerts: each fires when it should, is silent when it should not, and tells a person what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.declarations import DURATION_BUCKETS_S
from service.errors import reasons
from tests.support.server import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = PROMETHEUS / "rules" / "rnnserve.yml"
CASES = sorted((PROMETHEUS / "tests").glob("*.yml"))
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on the PATH")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
each_alert = pytest.mark.parametrize("alert", ALERTS)


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_its_configuration_and_the_rules() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", RULES)


@needs_promtool
@pytest.mark.parametrize("cases", CASES, ids=lambda file: file.stem)
def test_alerts_fire_and_are_silent_as_their_cases_say(cases: Path) -> None:
    promtool("test", "rules", cases)


@each_alert
def test_an_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not(alert: str) -> None:
    tests = [
        case
        for file in CASES
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    ]
    assert {bool(case["exp_alerts"]) for case in tests} == {True, False}


@each_alert
def test_an_alert_says_how_urgent_it_is_and_where_to_read_what_to_do(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    text = (ROOT / page).read_text()
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-"): h for h in re.findall(r"^## (.*)$", text, re.M)
    }
    entry = text.partition(f"## {headings[anchor]}\n")[2].partition("\n## ")[0]
    assert f"`{alert}`" in entry
    assert rule["labels"]["severity"] in entry


def test_the_reasons_in_the_rules_are_reasons_of_the_contract() -> None:
    lists = [found for rule in rules() for found in re.findall(r'reason=~"([^"]*)"', rule["expr"])]
    assert lists
    assert {reason for found in lists for reason in found.split("|")} <= set(reasons())


def test_the_bound_of_the_objective_is_that_of_a_bucket() -> None:
    bounds = {float(bound) for rule in rules() for bound in re.findall(r'le="([^"]*)"', rule["expr"])}
    assert bounds
    assert bounds <= {*DURATION_BUCKETS_S}


def test_the_container_of_prometheus_has_the_rules_where_its_configuration_looks() -> None:
    configured = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["rule_files"]
    assert [file for pattern in configured for file in PROMETHEUS.glob(pattern)] == [RULES]
    volumes = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["volumes"]
    assert "./deploy/prometheus/rules:/etc/prometheus/rules:ro" in volumes
