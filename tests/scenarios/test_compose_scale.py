"""Three services over Redis behind Envoy, in containers: streams go on while one dies, drains and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rnnserve import Client, Notice
from rnnserve.tensors import Array
from tests.support.containers import (
    CHANGED_S,
    TIMEOUT_S,
    Compose,
    compose_works,
    composed,
    described,
    docker,
    only_root,
    page,
    told_by_prometheus,
    until,
)
from tests.support.server import ROOT, free_port

PROJECT = "rnnserve-scale-test"
UP = ("up", "--detach", "--wait", "--scale", "service=3", "envoy", "prometheus")  # builds the image where there is none
# As in the image of Redis; a stand-in for it may have another owner, which an empty volume would take over again.
OWN_DATA = (
    *("run", "--rm", "--no-deps", "--user", "0", "--cap-add", "CHOWN", "redis"),
    *("sh", "-c", "touch /data/.kept && chown 999:1000 /data"),
)
STREAMS = 8
STEPS = 150
PACE_S = 0.01

pytestmark = [
    pytest.mark.xdist_group("compose"),
    pytest.mark.timeout(TIMEOUT_S),
    pytest.mark.skipif(not compose_works(), reason="no Docker engine with compose runs here"),
    only_root,
]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make secrets` makes them."""
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run(["sh", str(ROOT / "deploy/make-secrets.sh"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def compose(port: int, secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The services, Redis, Prometheus, and Envoy on a free port."""
    override = tmp_path_factory.mktemp("compose") / "override.yml"
    override.write_text(
        f"""
services:
  envoy: {{ports: !override ["127.0.0.1:{port}:50051"]}}
  prometheus: {{ports: !reset []}}
secrets: {{{", ".join(f"{file.name}: {{file: {file}}}" for file in secrets.iterdir())}}}
"""
    )
    with composed(PROJECT, override, *UP, profile="scale", before=OWN_DATA) as compose:
        yield compose


def live_sessions(container: str) -> int:
    families = list(text_string_to_metric_families(page(container, "9464/metrics")))
    return int(sum(sample.value for f in families if f.name == "rnnserve_sessions" for sample in f.samples))


def services_by_load(compose: Compose) -> list[str]:
    """The one with the most streams first."""
    containers: Mapping[str, int] = {name: live_sessions(name) for name in compose("ps", "--quiet", "service").split()}
    assert len(containers) == 3
    return sorted(containers, key=lambda name: -containers[name])


@dataclass
class Worked:
    """What a client has seen of its stream."""

    steps: list[int] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)


def work(port: int, recording: Array, one: Worked, over: Event) -> None:
    """A stream of the recording, again and again until all is over."""

    def inputs() -> Iterator[Array]:
        for index in count():
            if index >= STEPS and over.is_set():
                return
            time.sleep(PACE_S)
            yield recording[index % len(recording)]

    def told(notice: Notice) -> None:
        one.reasons.add(notice.reason)

    with (
        Client(f"127.0.0.1:{port}", resume_timeout_s=CHANGED_S) as client,
        client.stream("activity", on_notice=told) as stream,
    ):
        for answer in stream.steps(inputs()):
            one.steps.append(answer.step)
            one.outputs.append(answer.output)


def go_on_over(port: int, event: Callable[[], None]) -> set[str]:
    """Whether all answers are those of a stream that nothing has happened to; what the clients were told."""
    with Client(f"127.0.0.1:{port}") as client:
        recording = np.asarray(client.samples("activity")[0].input, np.float32)
    worked, over = [Worked() for _ in range(STREAMS)], Event()
    with ThreadPoolExecutor(STREAMS) as threads:
        done = [threads.submit(work, port, recording, one, over) for one in worked]
        try:
            until(lambda: all(len(one.steps) > STEPS // 3 for one in worked) or any(one.done() for one in done))
            event()
            answered = [len(one.steps) for one in worked]
            until(lambda: all(len(one.steps) > then for one, then in zip(worked, answered, strict=True)))
        finally:
            over.set()
        for one_done in done:
            one_done.result(CHANGED_S)
    longest = max(len(one.steps) for one in worked)
    with Client(f"127.0.0.1:{port}") as client, client.stream("activity") as stream:
        expected = [answer.output for answer in stream.steps(recording[i % len(recording)] for i in range(longest))]
    for one in worked:
        assert one.steps == list(range(len(one.steps)))
        assert np.allclose(one.outputs, expected[: len(one.steps)], atol=1e-6)
    return set().union(*(one.reasons for one in worked))


def test_prometheus_scrapes_each_service(compose: Compose) -> None:
    prometheus = compose("ps", "--quiet", "prometheus").strip()
    query = 'query?query=up{job="rnnserve-services"}'

    def up() -> int:
        return sum(result["value"][1] == "1" for result in told_by_prometheus(prometheus, query)["result"])

    until(lambda: up() == 3)


def test_a_secret_is_in_no_log_and_not_in_what_describes_a_container(compose: Compose, secrets: Path) -> None:
    told = compose("logs") + docker("inspect", *compose("ps", "--quiet").split()) + compose("top")
    for name in ("redis_password", "redis_url", "snapshot_keys"):
        secret = (secrets / name).read_text().strip().rpartition(":")[2]
        assert f"/run/secrets/{name}" in told
        assert secret not in told
    assert (secrets / "redis_password").read_text() not in told


def test_redis_answers_nobody_without_the_password(compose: Compose) -> None:
    assert "NOAUTH" in compose("exec", "-T", "redis", "redis-cli", "ping")


def test_a_session_can_be_exported_for_all_have_the_keys(compose: Compose, port: int) -> None:
    with Client(f"127.0.0.1:{port}") as client:
        with client.stream("activity") as stream:
            stream.step(client.samples("activity")[0].input[0])
            session = stream.session
            exported = client.export_session(session)
        client.import_session(exported.data)


def test_streams_go_on_elsewhere_when_a_service_is_killed(compose: Compose, port: int) -> None:
    killed: list[str] = []

    def kill() -> None:
        killed.append(services_by_load(compose)[0])
        os.kill(int(described(killed[0], ".State.Pid")), signal.SIGKILL)

    assert "interrupted" in go_on_over(port, kill)
    until(lambda: described(killed[0], ".RestartCount") == "1")
    compose(*UP)


def test_streams_go_on_while_a_service_drains_and_new_ones_reach_it_when_it_is_back(
    compose: Compose, port: int
) -> None:
    drained: list[str] = []

    def drain() -> None:
        drained.append(services_by_load(compose)[0])
        docker("stop", drained[0])

    assert go_on_over(port, drain) & {"draining", "interrupted"}
    assert described(drained[0], ".State.ExitCode") == "0"
    docker("start", drained[0])
    compose(*UP)

    def is_reached() -> bool:
        with Client(f"127.0.0.1:{port}") as client, client.stream("activity"):
            return live_sessions(drained[0]) > 0

    until(is_reached)
