"""Models taken into service and out of it, in a service of one process and in one of several."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from models.bundle import load_manifest, write_manifest
from rnnserve import BundleInvalid, BundleMismatch, Client, ModelInUse, ModelNotFound
from tests.support.bundles import accumulated, write_accumulator
from tests.support.server import RunningServer, start_server
from tests.support.wire import eventually
from tests.wire.test_workers import counted, lanes, workers

pytestmark = pytest.mark.xdist_group("loading")

ASKED = 12  # connections, so that each of two workers has one but for once in two thousand times
WHOLE = [np.ones((4, 3), np.float32)]


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "workers"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Of the accumulator, and what the tests put beside it."""
    folder = tmp_path_factory.mktemp("loading")
    write_accumulator(folder / "repository")
    (folder / "state").mkdir()
    with start_server(folder / "repository", folder / "state", workers=request.param) as server:
        yield server


def own(server: RunningServer) -> Path:
    """Its repository."""
    return server.log_file.parents[1] / "repository"


@pytest.fixture
def server(running: RunningServer, repository: Path) -> Iterator[RunningServer]:
    """Serves accumulator/1 and vanilla/1, and has nothing else, when a test begins."""
    put(repository, running, "vanilla/1")
    with Client(running.target) as client:
        client.load_model("vanilla")
        yield running
        for model in client.models():
            if model.name != "accumulator":
                client.unload_model(model.name, model.version, end_streams=True)
        client.load_model("accumulator")
    for folder in own(running).iterdir():
        if folder.name != "accumulator":
            shutil.rmtree(folder)


def put(bundles: Path, server: RunningServer, model: str) -> Path:
    """Into its repository."""
    return shutil.copytree(bundles / model, own(server) / model)


@contextmanager
def everywhere(server: RunningServer) -> Iterator[list[Client]]:
    """Several connections, which the workers share among them."""
    clients = [Client(server.target) for _ in range(ASKED)]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


def served(client: Client) -> set[str]:
    return {f"{model.name}/{model.version}" for model in client.models()}


def test_a_model_in_the_repository_is_served_by_all_processes_once_it_is_loaded(
    server: RunningServer, repository: Path
) -> None:
    put(repository, server, "bidirectional/1")
    put(repository, server, "vanilla/2")
    with everywhere(server) as clients:
        with pytest.raises(ModelNotFound):
            clients[0].predict("bidirectional", WHOLE)
        assert clients[0].load_model("bidirectional").version == 1
        assert clients[1].load_model("vanilla").version == 2
        for client in clients:
            assert served(client) == {"accumulator/1", "bidirectional/1", "vanilla/1", "vanilla/2"}
            client.predict("bidirectional", WHOLE)
            assert client.health("bidirectional") == "serving"
            with client.stream("vanilla", version=2) as stream:
                stream.step(WHOLE[0][0])


def test_a_model_that_is_served_already_may_be_loaded_again(server: RunningServer) -> None:
    with Client(server.target) as client, client.stream("accumulator") as stream:
        stream.step([1.0])
        client.load_model("accumulator")
        assert stream.step([2.0]).output.tolist() == list(accumulated([1.0, 2.0])[1])


def test_a_bundle_that_is_wrong_is_loaded_nowhere_and_harms_nothing(server: RunningServer, repository: Path) -> None:
    folder = put(repository, server, "stacked/1")
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    with everywhere(server) as clients:
        with pytest.raises(BundleInvalid, match="weights_sha256") as refusal:
            clients[0].load_model("stacked")
        assert refusal.value.metadata["model"] == "stacked"
        assert str(own(server)) not in str(refusal.value)
        for client in clients:
            assert served(client) == {"accumulator/1", "vanilla/1"}
            client.predict("vanilla", WHOLE)


@pytest.mark.parametrize(("name", "version"), [("nothing", 0), ("vanilla", 9), ("../repository/vanilla", 0), ("", 0)])
def test_what_is_not_in_the_repository_is_not_found(server: RunningServer, name: str, version: int) -> None:
    with Client(server.target) as client, pytest.raises(ModelNotFound):
        client.load_model(name, version)


def test_an_unloaded_model_is_served_by_no_process(server: RunningServer) -> None:
    with everywhere(server) as clients:
        assert clients[0].unload_model("vanilla") == 1
        for client in clients:
            assert served(client) == {"accumulator/1"}
            with pytest.raises(ModelNotFound):
                client.predict("vanilla", WHOLE)
            with pytest.raises(ModelNotFound):
                client.stream("vanilla").open()
        with pytest.raises(ModelNotFound):
            clients[0].unload_model("vanilla")
    assert health(server, "models/vanilla") == HealthCheckResponse.NOT_SERVING


def test_a_model_with_live_streams_is_not_unloaded_and_they_go_on(server: RunningServer) -> None:
    with everywhere(server) as clients, Client(server.target) as other, other.stream("accumulator") as stream:
        stream.step([1.0])
        for client in clients:
            with pytest.raises(ModelInUse) as refusal:
                client.unload_model("accumulator")
        assert refusal.value.metadata["streams"] == "1"
        assert stream.step([2.0]).output.tolist() == list(accumulated([1.0, 2.0])[1])
        assert "accumulator/1" in served(other)


def test_streams_that_are_ended_with_their_model_go_on_once_it_is_served_again(server: RunningServer) -> None:
    with Client(server.target) as client, Client(server.target) as other:
        stream = client.stream("accumulator")
        stream.open()
        stream.step([1.0])
        other.unload_model("accumulator", end_streams=True)
        with pytest.raises(ModelNotFound):
            stream.step([2.0])
        with pytest.raises(ModelNotFound):
            client.stream("accumulator", resume=stream.resume_point).open()
        other.load_model("accumulator")
        resumed = client.stream("accumulator", resume=stream.resume_point)
        resumed.open()
        assert resumed.step([2.0]).output.tolist() == list(accumulated([1.0, 2.0])[1])
        resumed.close()


def test_a_session_does_not_go_on_with_other_weights_of_its_model(server: RunningServer, repository: Path) -> None:
    with Client(server.target) as client:
        stream = client.stream("vanilla")
        stream.open()
        stream.step(WHOLE[0][0])
        client.unload_model("vanilla", end_streams=True)
        folder = own(server) / "vanilla" / "1"
        shutil.rmtree(folder)
        shutil.copytree(repository / "vanilla" / "2", folder)
        write_manifest(folder, load_manifest(repository / "vanilla" / "2").model_copy(update={"version": 1}))
        client.load_model("vanilla")
        with pytest.raises(BundleMismatch):
            client.stream("vanilla", resume=stream.resume_point).open()


@pytest.mark.parametrize("running", [2], ids=["workers"], indirect=True)
def test_a_process_that_is_started_again_serves_what_the_others_do(server: RunningServer, repository: Path) -> None:
    put(repository, server, "bidirectional/1")
    with Client(server.target) as client:
        client.load_model("bidirectional")
        client.unload_model("vanilla")
    put(repository, server, "stacked/1")  # which nobody has loaded
    before = everyone(server)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(everyone(server)) == 3 and not before & everyone(server))
    eventually(lambda: counted(server, "rnnserve_workers") == 2)  # that serve
    with everywhere(server) as clients:
        for client in clients:
            assert served(client) == {"accumulator/1", "bidirectional/1"}
        eventually(lambda: health(server, "rnnserve.v1.SequenceService") == HealthCheckResponse.SERVING)
        clients[0].predict("bidirectional", WHOLE)


@pytest.mark.parametrize("running", [2], ids=["workers"], indirect=True)
def test_while_the_lane_is_away_only_the_service_of_whole_sequences_says_so(server: RunningServer) -> None:
    os.kill(lanes(server)[0], signal.SIGKILL)
    eventually(lambda: health(server, "rnnserve.v1.SequenceService") == HealthCheckResponse.NOT_SERVING)
    assert health(server, "rnnserve.v1.RealTimeService") == HealthCheckResponse.SERVING
    eventually(lambda: health(server, "rnnserve.v1.SequenceService") == HealthCheckResponse.SERVING)


def everyone(server: RunningServer) -> set[int]:
    return {*workers(server), *lanes(server)}


def health(server: RunningServer, name: str) -> int:
    with grpc.insecure_channel(server.target) as channel:
        stub: Any = HealthStub(channel)
        status: int = stub.Check(HealthCheckRequest(service=name), wait_for_ready=True).status
        return status
