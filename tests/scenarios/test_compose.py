"""The service and Prometheus in containers: what they may do, what is scraped, and a stream that outlives one."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rnnserve import Client
from rnnserve.tensors import Array
from tests.support.containers import (
    TIMEOUT_S,
    Compose,
    compose_works,
    composed,
    described,
    docker,
    only_root,
    told_by_prometheus,
    until,
)
from tests.support.server import ROOT, free_port

PROJECT = "rnnserve-test"  # beside what else runs here
IMAGE = "rnnserve:0.1.0"
UP = ("up", "--detach", "--wait", "rnnserve", "prometheus")  # builds the image where there is none
STEPS = 200
SBOM = "/usr/share/doc/rnnserve/sbom.cdx.json"
LABEL = "org.opencontainers.image."

pytestmark = [
    pytest.mark.xdist_group("compose"),
    pytest.mark.timeout(TIMEOUT_S),
    pytest.mark.skipif(not compose_works(), reason="no Docker engine with compose runs here"),
]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def compose(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The service on a free port, and Prometheus."""
    override = tmp_path_factory.mktemp("compose") / "override.yml"
    override.write_text(
        f"""
services:
  rnnserve: {{ports: !override ["127.0.0.1:{port}:50051"]}}
  prometheus: {{ports: !reset []}}
"""
    )
    with composed(PROJECT, override, *UP) as compose:
        yield compose


@pytest.fixture
def container(compose: Compose) -> str:
    return compose("ps", "--quiet", "rnnserve").strip()


@pytest.fixture
def prometheus(compose: Compose) -> str:
    return compose("ps", "--quiet", "prometheus").strip()


def in_image(*words: str) -> str:
    return docker("run", "--rm", "--read-only", "--network", "none", IMAGE, *words)


@pytest.mark.parametrize("files", [[], ["deploy/compose-snapshots.yml"]], ids=["alone", "snapshots"])
def test_compose_accepts_its_files(files: list[str]) -> None:
    given = [word for file in ["docker-compose.yml", *files] for word in ("--file", str(ROOT / file))]
    assert docker("compose", *given, "--profile", "scale", "config", "--quiet") == ""


def test_the_image_says_what_it_is_and_what_is_in_it(compose: Compose) -> None:
    labels = json.loads(described(IMAGE, "json .Config.Labels"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name: labels[LABEL + name] for name in ("title", "version", "licenses")} == {
        "title": project["name"], "version": project["version"], "licenses": project["license"],
    }  # fmt: skip
    bill = json.loads(in_image("cat", SBOM))
    installed = json.loads(
        in_image(
            "python", "-c",
            "import importlib.metadata as m, json; print(json.dumps([d.name for d in m.distributions()]))",
        )
    )  # fmt: skip
    assert bill["bomFormat"] == "CycloneDX"
    named = {part["name"] for part in [bill["metadata"]["component"], *bill["components"]]}
    assert named == set(installed)
    assert {"rnnserve", "torch", "structlog", "opentelemetry-sdk"} <= named


def test_nothing_in_the_image_builds_or_installs() -> None:
    tools = in_image("sh", "-c", "command -v gcc cc c++ make pip pip3 || true")
    modules = in_image(
        "python", "-c", "import importlib.util as u; print(u.find_spec('pip'), u.find_spec('setuptools'))"
    )
    assert (tools, modules) == ("", "None None\n")


def test_the_service_can_write_to_its_volumes_only(compose: Compose) -> None:
    def may_write(folder: str) -> bool:
        return "yes" in compose(
            "exec", "-T", "rnnserve", "sh", "-c", f"touch {folder}/x && rm {folder}/x && echo yes; :"
        )

    assert compose("exec", "-T", "rnnserve", "id", "-u").strip() == "10001"
    writable = {"/tmp", "/var/lib/rnnserve", "/var/spool/rnnserve"}
    assert {folder for folder in (*writable, "/app", "/opt/venv", "/var/tmp") if may_write(folder)} == writable
    status = compose("exec", "-T", "rnnserve", "cat", "/proc/1/status")
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (int(values["CapBnd"], 16), values["NoNewPrivs"]) == (0, "1")


def test_several_workers_serve_on_a_read_only_file_system(compose: Compose) -> None:
    name = f"{PROJECT}-workers"
    read_only = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--env", "RNNSERVE_WORKERS=2")
    docker("run", "--detach", "--name", name, *read_only, IMAGE)
    try:
        until(lambda: described(name, ".State.Health.Status") == "healthy")
    finally:
        docker("rm", "--force", "--volumes", name)


def test_signals_change_the_log_level_of_a_container(compose: Compose, port: int) -> None:
    compose("kill", "--signal", "SIGUSR1", "rnnserve")
    until(lambda: '"level": "debug"' in compose("logs", "rnnserve"))
    compose("kill", "--signal", "SIGUSR2", "rnnserve")


def test_prometheus_scrapes_the_service_and_no_alert_fires(compose: Compose, prometheus: str) -> None:
    def is_scraped() -> bool:
        targets = told_by_prometheus(prometheus, "targets")["activeTargets"]
        return ("rnnserve", "up") in [(target["labels"]["job"], target["health"]) for target in targets]

    until(is_scraped)
    until(lambda: all(rule["health"] != "unknown" for rule in rules(prometheus)))
    assert [rule for rule in rules(prometheus) if rule["health"] != "ok"] == []
    until(lambda: alerts(prometheus) == [])


def rules(prometheus: str) -> list[dict[str, str]]:
    return [rule for group in told_by_prometheus(prometheus, "rules")["groups"] for rule in group["rules"]]


def alerts(prometheus: str) -> list[dict[str, Any]]:
    """That fire, or are about to."""
    found: list[dict[str, Any]] = told_by_prometheus(prometheus, "alerts")["alerts"]
    return found


def kill_its_process(compose: Compose) -> None:
    """Which docker does not know to be meant: `docker kill` would keep it from being started again."""
    container = compose("ps", "--quiet", "rnnserve").strip()
    before = int(described(container, ".RestartCount"))
    os.kill(int(described(container, ".State.Pid")), signal.SIGKILL)
    until(lambda: int(described(container, ".RestartCount")) == before + 1)


def kill_the_container(compose: Compose) -> None:
    compose("kill", "--signal", "KILL", "rnnserve")
    compose(*UP)


def restart_it(compose: Compose) -> None:
    compose("restart", "rnnserve")


@pytest.mark.parametrize("end", [restart_it, kill_the_container, pytest.param(kill_its_process, marks=only_root)])
def test_a_stream_goes_on(end: Callable[[Compose], None], compose: Compose, port: int, prometheus: str) -> None:
    with Client(f"127.0.0.1:{port}") as client:
        recording = np.asarray(client.samples("activity")[0].input, np.float32)[:STEPS]
        with client.stream("activity") as stream:
            expected = [answer.output for answer in stream.steps(recording)]

        def inputs() -> Iterator[Array]:
            yield from recording[: STEPS // 2]
            end(compose)
            yield from recording[STEPS // 2 :]

        with client.stream("activity") as stream:
            answers = list(stream.steps(inputs()))
    assert [answer.step for answer in answers] == list(range(STEPS))
    assert np.allclose([answer.output for answer in answers], expected, atol=1e-6)
    named = {"RnnserveStartsAgain"}  # by now it may be told of, for each of these tests has it started again
    until(lambda: {alert["labels"]["alertname"] for alert in alerts(prometheus)} <= named)
