"""Several processes on one port: any of them may die, and the streams go on."""

import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest

from rnnserve import Client, LaneLost, SessionLimit, Unreachable
from tests.support.bundles import accumulated
from tests.support.server import RunningServer, free_port, start_server
from tests.support.wire import eventually, live_stream, open_, random_steps, refusal_of, resume

pytestmark = pytest.mark.xdist_group("workers")

STREAMS = 6
VALUES = [float(i % 100 == 0) for i in range(10_000)]  # so that the sums of sums stay exact: below 2^24
SUMS = accumulated(VALUES)
TIMEOUT_S = 60.0
TOKEN = b"0123456789abcdef"

SETTINGS = {
    "workers": 2, "checkpoint_interval_s": 0.1, "session_lease_s": 1, "worker_timeout_s": 1, "drain_timeout_s": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Whatever is done to its processes, they are started again."""
    with start_server(repository, tmp_path_factory.mktemp("workers"), **SETTINGS) as server:
        yield server


@pytest.fixture
def short_lived(repository: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """For what ends it."""
    with start_server(repository, tmp_path, **SETTINGS) as server:
        yield server


def workers(server: RunningServer) -> list[int]:
    return server.children("service.worker")


def lanes(server: RunningServer) -> list[int]:
    """One, but while it is started again."""
    return server.children("service.lane")


def page(server: RunningServer) -> dict[str, float]:
    """Every sample on the page of metrics."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def counted(server: RunningServer, metric: str) -> float:
    return sum(value for name, value in page(server).items() if name.partition("{")[0] == metric)


def failed_starts(server: RunningServer) -> float:
    return sum(value for name, value in page(server).items() if "process_restarts" in name and 'why="failed"' in name)


@dataclass
class Streaming:
    """Streams at work in threads, each on a connection of its own, until told to stop."""

    server: RunningServer
    stop: threading.Event = field(default_factory=threading.Event)
    steps: list[int] = field(default_factory=lambda: [0] * STREAMS)

    def run(self, number: int) -> float:
        """Every answer must be right; the longest wait for one."""
        longest_s = 0.0
        options = {"timeout_s": 1.0}
        with Client(self.server.target, **options) as client, client.stream("accumulator") as stream:  # type: ignore[arg-type]
            for index, value in enumerate(VALUES):
                start_s = time.monotonic()
                answer = stream.step([value])
                longest_s = max(longest_s, time.monotonic() - start_s)
                assert (answer.step, tuple(answer.output.tolist())) == (index, SUMS[index])
                self.steps[number] = index + 1
                if self.stop.wait(0.005):
                    return longest_s
        raise AssertionError("the values ran out")

    def go_on(self) -> None:
        """Return once every stream has been answered some more."""
        before = list(self.steps)
        eventually(lambda: all(now >= then + 5 for now, then in zip(self.steps, before, strict=True)))


@pytest.fixture
def streaming(server: RunningServer) -> Iterator[Streaming]:
    """Checks at the end that no step was lost, repeated or answered wrongly."""
    streaming = Streaming(server)
    with ThreadPoolExecutor(STREAMS) as threads:
        results = [threads.submit(streaming.run, number) for number in range(STREAMS)]
        try:
            streaming.go_on()
            yield streaming
        finally:
            streaming.stop.set()
        for result in results:
            result.result(TIMEOUT_S)


def test_streams_go_on_when_a_worker_is_killed_and_it_is_started_again(
    server: RunningServer, streaming: Streaming
) -> None:
    before = workers(server)
    applied, restarts = (counted(server, f"rnnserve_{what}_total") for what in ("steps", "process_restarts"))
    os.kill(before[0], signal.SIGKILL)
    streaming.go_on()
    eventually(lambda: len(workers(server)) == 2 and before[0] not in workers(server))
    assert counted(server, "rnnserve_steps_total") >= applied
    eventually(lambda: counted(server, "rnnserve_process_restarts_total") == restarts + 1)
    eventually(lambda: counted(server, "rnnserve_sessions") == STREAMS)


def test_streams_go_on_when_a_worker_is_stuck_and_it_is_killed(server: RunningServer, streaming: Streaming) -> None:
    before = workers(server)
    os.kill(before[0], signal.SIGSTOP)
    streaming.go_on()
    eventually(lambda: len(workers(server)) == 2 and before[0] not in workers(server))
    assert any('why="stuck"' in name for name in page(server))


def test_a_worker_that_cannot_be_started_again_is_counted_at_each_try_until_it_can(
    repository: Path, tmp_path: Path
) -> None:
    mine, away = tmp_path / "repository" / "accumulator", tmp_path / "away"
    shutil.copytree(repository / "accumulator", mine)
    with start_server(mine.parent, tmp_path, **SETTINGS) as server:
        mine.rename(away)
        os.kill(workers(server)[0], signal.SIGKILL)
        eventually(lambda: failed_starts(server) >= 2)
        away.rename(mine)
        eventually(lambda: counted(server, "rnnserve_workers") == 2)


def test_all_workers_are_restarted_one_after_the_other_and_no_stream_notices(
    server: RunningServer, streaming: Streaming
) -> None:
    before = workers(server)
    server.process.send_signal(signal.SIGHUP)
    until_s = time.monotonic() + 2 * TIMEOUT_S  # each starts first, on a machine that may do much else
    while "all workers are new" not in server.log():
        assert time.monotonic() < until_s
        streaming.go_on()
    assert not set(before) & set(workers(server))


def test_a_lane_that_dies_fails_what_it_held_and_no_more(server: RunningServer) -> None:
    sequence = np.ones((20, 3), np.float32)
    with Client(server.target) as client:
        client.predict("bidirectional", [sequence])
        os.kill(lanes(server)[0], signal.SIGKILL)

        def answers() -> bool:
            try:
                client.predict("bidirectional", [sequence])
            except LaneLost:
                return False
            return True

        eventually(answers)


def test_a_drain_ends_all_processes_and_loses_nothing(
    short_lived: RunningServer, repository: Path, tmp_path: Path
) -> None:
    with Client(short_lived.target) as client:
        stream = client.stream("accumulator")
        stream.open()
        for index in range(10):
            stream.step([VALUES[index]])
        pids = workers(short_lived)
        assert short_lived.stop() == 0
        stream.abort()
        point = stream.resume_point
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with start_server(repository, tmp_path) as alone, Client(alone.target) as client:  # over the same file
        stream = client.stream("accumulator", resume=point)
        stream.open()
        assert tuple(stream.step([VALUES[10]]).output.tolist()) == SUMS[10]
        stream.close()


def test_workers_end_with_their_supervisor(short_lived: RunningServer) -> None:
    pids = workers(short_lived)
    short_lived.kill()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    with Client(short_lived.target, timeout_s=1.0) as client, pytest.raises(Unreachable):
        client.models()


def test_a_port_that_another_service_has_is_not_shared_with_it(server: RunningServer, repository: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=f"port: {server.port} on 127.0.0.1 is in use"),
        start_server(repository, workers=2, port=server.port),
    ):
        pass


def test_workers_do_not_share_what_is_in_memory(repository: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="workers: sessions in memory are each worker's own"),
        start_server(repository, workers=2, session_store="memory", port=free_port()),
    ):
        pass


def test_the_limit_on_streams_is_that_of_all_workers(repository: Path, tmp_path: Path) -> None:
    with start_server(repository, tmp_path, workers=2, max_streams=3) as server:
        clients = [Client(server.target) for _ in range(12)]
        opened = 0
        for client in clients:
            stream = client.stream("accumulator")
            try:
                stream.open()
                opened += 1
            except SessionLimit:
                pass
            time.sleep(0.5)  # the workers tell each other five times a second
        assert opened == 3
        for client in clients:
            client.close()


def connections(pid: int, port: int) -> int:
    """How many a process has as a server on the port. Linux only."""
    established = {
        fields[9]
        for kind in ("tcp", "tcp6")
        for fields in (line.split() for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:])
        if fields[1].endswith(f":{port:04X}") and fields[3] == "01"
    }
    names = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()]
    return sum(name.startswith("socket:[") and name[8:-1] in established for name in names)


def test_a_worker_that_drains_sends_its_clients_to_another_one_and_finishes_what_it_has(
    repository: Path, tmp_path: Path
) -> None:
    with (
        start_server(repository, tmp_path, **SETTINGS | {"drain_timeout_s": 60}) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, open_("vanilla", "stays")) as stays,
    ):
        opening = open_("accumulator", "moves", token=TOKEN)
        with live_stream(channel, opening) as moves:
            moves.step([[1.0]])
            (draining,) = [pid for pid in workers(server) if connections(pid, server.port)]
            os.kill(draining, signal.SIGTERM)
            assert moves.read().HasField("notice")
            with pytest.raises(grpc.RpcError) as ended:
                moves.read()
        refusal = refusal_of(ended.value)
        assert (refusal.reason, refusal.retry_after_s) == ("DRAINING", 0.1)
        with live_stream(channel, resume(opening, answered_step=1)) as again:  # of the same channel
            assert again.step([[1.0]]).tolist() == [[2.0, 1.0]]
        assert stays.read().HasField("notice")
        stays.step(random_steps(1))
        assert draining in workers(server)


def test_the_streams_of_a_client_use_its_connections_in_turn(server: RunningServer) -> None:
    with Client(server.target, connections=5) as client:
        streams = [client.stream("accumulator") for _ in range(10)]
        for stream in streams:
            stream.open()
        assert sum(connections(pid, server.port) for pid in workers(server)) == 5
        for stream in streams:
            stream.close()


def test_a_stream_leaves_a_stuck_worker_by_another_connection_and_that_one_changes_nothing_when_it_wakes_up(
    repository: Path, tmp_path: Path
) -> None:
    patient = SETTINGS | {"worker_timeout_s": 60}
    with (
        start_server(repository, tmp_path, **patient) as server,
        Client(server.target, timeout_s=1.0, connections=32) as client,  # each meets either worker, by chance
        client.stream("accumulator") as stream,
    ):
        stream.step([1.0])
        (stuck,) = [pid for pid in workers(server) if connections(pid, server.port)]
        os.kill(stuck, signal.SIGSTOP)
        try:
            assert stream.step([1.0]).output.tolist() == [2.0, 1.0]
        finally:
            os.kill(stuck, signal.SIGCONT)
        eventually(lambda: "the lease of 1 s has run out" in server.log())
        (other,) = (pid for pid in workers(server) if pid != stuck)
        os.kill(other, signal.SIGKILL)
        assert stream.step([1.0]).output.tolist() == [3.0, 3.0]


def test_a_worker_that_is_stuck_dies_with_the_supervisor(short_lived: RunningServer) -> None:
    def port_is_free() -> bool:
        with socket.socket() as listener:
            return listener.connect_ex(("127.0.0.1", short_lived.port)) != 0

    os.kill(workers(short_lived)[0], signal.SIGSTOP)
    short_lived.kill()
    eventually(port_is_free)


def test_a_client_without_a_connection_is_refused() -> None:
    with pytest.raises(ValueError, match="connections must be 1 or more, not 0"):
        Client("localhost:1", connections=0)
