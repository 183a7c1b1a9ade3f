import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.server import ROOT, RunningServer, free_port, start_server
from tests.support.wire import TIMEOUT_S

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
NAMES = [
    "",
    "rnnserve.v1.RealTimeService",
    "rnnserve.v1.SequenceService",
    "rnnserve.v1.ModelService",
    "rnnserve.v1.SessionService",
    "session-store",
    "models/vanilla",
    "models/bidirectional",
]


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def request(name: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


@pytest.mark.parametrize("name", NAMES)
def test_the_server_its_services_and_its_models_are_serving(stub: Any, name: str) -> None:
    assert stub.Check(request(name), timeout=TIMEOUT_S).status == SERVING


@pytest.mark.parametrize("name", ["models/nobody", "rnnserve.v1.Nothing"])
def test_what_is_not_served_is_not_found(stub: Any, name: str) -> None:
    with pytest.raises(grpc.RpcError) as ended:
        stub.Check(request(name), timeout=TIMEOUT_S)
    assert ended.value.code() == grpc.StatusCode.NOT_FOUND
    watching = stub.Watch(request(name), timeout=TIMEOUT_S)
    assert next(watching).status == SERVICE_UNKNOWN
    watching.cancel()


def test_those_who_watch_see_not_serving_when_the_server_drains(repository: Path) -> None:
    with start_server(repository) as server, grpc.insecure_channel(server.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watching = [stub.Watch(request(name), timeout=TIMEOUT_S) for name in NAMES]
        assert [next(watch).status for watch in watching] == [SERVING] * len(NAMES)
        server.terminate()
        assert [next(watch).status for watch in watching] == [NOT_SERVING] * len(NAMES)
        assert server.stop() == 0


def checked_from_within(port: int) -> tuple[int, str]:
    """By what containers run: its exit code and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "service.healthcheck"],
        cwd=ROOT,
        env=os.environ | {"RNNSERVE_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.returncode, done.stderr.strip()


def test_a_container_is_healthy_while_its_server_serves(server: RunningServer) -> None:
    assert checked_from_within(server.port) == (0, "")


def test_a_container_without_a_server_is_not_healthy_and_says_why() -> None:
    assert checked_from_within(free_port()) == (1, "UNAVAILABLE")
