"""Our client goes on over whatever happens to its server; the caller sees only time pass."""

import asyncio
import signal
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from rnnserve import AsyncClient, Client, Evicted, Notice, SessionExists, SessionNotFound, Stream, Unreachable
from tests.support.bundles import accumulated
from tests.support.server import RunningServer, start_server
from tests.support.wire import eventually, metric

VALUES = [float(i % 7) for i in range(300)]
SUMS = accumulated(VALUES)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def slowly(reached: threading.Event, go_on: threading.Event, place: int) -> Iterator[list[float]]:
    """The values; half-way the source says so and waits."""
    for index, value in enumerate(VALUES):
        if index == place:
            reached.set()
            assert go_on.wait(60)
        yield [value]


def step(stream: Stream, indices: range) -> None:
    for index in indices:
        answer = stream.step([VALUES[index]])
        assert (answer.step, tuple(answer.output.tolist())) == (index, SUMS[index])


@pytest.mark.parametrize("crash", [True, False])
def test_steps_go_on_over_a_restart_without_a_hole_or_a_repetition(
    repository: Path, tmp_path: Path, port: int, crash: bool
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    answers: list[tuple[int, tuple[float, ...]]] = []

    def stream_all() -> None:
        with Client(f"127.0.0.1:{port}") as client, client.stream("accumulator") as stream:
            answers.extend((a.step, tuple(a.output.tolist())) for a in stream.steps(slowly(reached, go_on, 150)))

    running = threading.Thread(target=stream_all)
    with start_server(repository, tmp_path, port=port, checkpoint_interval_s=0.05) as server:
        running.start()
        assert reached.wait(60)
        if crash:
            server.kill()
        else:
            server.terminate()
            assert server.process.wait(30) == 0
    with start_server(repository, tmp_path, port=port):
        go_on.set()
        running.join(60)
    assert answers == list(enumerate(SUMS))


async def test_an_awaited_stream_goes_on_over_a_crash_too(repository: Path, tmp_path: Path, port: int) -> None:
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        with start_server(repository, tmp_path, port=port) as server:
            stream = client.stream("accumulator")
            await stream.open()
            for index in range(20):
                await stream.step([VALUES[index]])
            server.kill()
        with start_server(repository, tmp_path, port=port):
            for index in range(20, 40):
                answer = await stream.step([VALUES[index]])
                assert (answer.step, tuple(answer.output.tolist())) == (index, SUMS[index])
            await stream.close()


def test_a_waiting_caller_is_told_of_a_crash_while_it_lasts_and_of_its_end(
    repository: Path, tmp_path: Path, port: int
) -> None:
    told: SimpleQueue[tuple[Notice, threading.Thread]] = SimpleQueue()
    reached, go_on = threading.Event(), threading.Event()
    answers: list[tuple[int, tuple[float, ...]]] = []

    def tell(notice: Notice) -> None:
        told.put((notice, threading.current_thread()))

    def stream_all() -> None:
        with Client(f"127.0.0.1:{port}") as client, client.stream("accumulator", on_notice=tell) as stream:
            answers.extend((a.step, tuple(a.output.tolist())) for a in stream.steps(slowly(reached, go_on, 150)))

    running = threading.Thread(target=stream_all)
    with start_server(repository, tmp_path, port=port, checkpoint_interval_s=0.05) as server:
        running.start()
        assert reached.wait(60)
        server.kill()
        interrupted, its_thread = told.get(timeout=20)  # though nothing is sent, and no server is there
        assert (interrupted.reason, type(interrupted.error), its_thread) == ("interrupted", Unreachable, running)
    with start_server(repository, tmp_path, port=port):
        resumed, its_thread = told.get(timeout=20)  # though nothing is sent
        assert (resumed.reason, its_thread) == ("resumed", running)
        assert resumed.step is not None
        assert resumed.step <= 150
        go_on.set()
        running.join(60)
    assert told.empty()
    assert answers == list(enumerate(SUMS))


async def test_an_awaiting_caller_is_told_of_a_crash_on_its_event_loop(
    repository: Path, tmp_path: Path, port: int
) -> None:
    told: list[tuple[str, asyncio.Task[object] | None]] = []

    def tell(notice: Notice) -> None:
        told.append((notice.reason, asyncio.current_task()))

    async with AsyncClient(f"127.0.0.1:{port}") as client:
        stream = client.stream("accumulator", on_notice=tell)
        with start_server(repository, tmp_path, port=port) as server:
            await stream.open()
            await stream.step([VALUES[0]])
            server.kill()
        with start_server(repository, tmp_path, port=port):
            answer = await stream.step([VALUES[1]])
            await stream.close()
    assert (answer.step, tuple(answer.output.tolist())) == (1, SUMS[1])
    assert told == [("interrupted", asyncio.current_task()), ("resumed", asyncio.current_task())]
    assert [notice.reason for notice in stream.notices] == ["interrupted", "resumed"]


def test_a_parked_session_goes_on_in_another_client(server: RunningServer) -> None:
    with Client(server.target) as client:
        stream = client.stream("accumulator")
        stream.open()
        step(stream, range(10))
        point = stream.resume_point
        stream.park()
    with Client(server.target) as client, client.stream("accumulator", resume=point) as stream:
        assert (stream.next_step, stream.missed) == (10, [])
        step(stream, range(10, 20))


def test_who_has_an_older_resume_point_gets_the_missed_answers_first(server: RunningServer) -> None:
    with Client(server.target) as client:
        stream = client.stream("accumulator")
        stream.open()
        step(stream, range(4))
        point = stream.resume_point
        step(stream, range(4, 5))
        stream.park()
        with client.stream("accumulator", resume=point) as stream:
            assert [(a.step, tuple(a.output.tolist())) for a in stream.missed] == [(4, SUMS[4])]
            step(stream, range(5, 8))


def test_a_closed_session_cannot_be_resumed(server: RunningServer) -> None:
    with Client(server.target) as client:
        with client.stream("accumulator") as stream:
            step(stream, range(3))
            point = stream.resume_point
        with pytest.raises(SessionNotFound), client.stream("accumulator", resume=point):
            pass


def test_the_session_of_another_is_never_taken_over(server: RunningServer) -> None:
    with Client(server.target) as client, client.stream("accumulator", session="pump-7") as stream:
        step(stream, range(3))
        with pytest.raises(SessionExists), client.stream("accumulator", session="pump-7"):
            pass
        step(stream, range(3, 6))


def test_a_session_that_met_a_limit_is_told_apart_from_one_that_never_was(repository: Path) -> None:
    with start_server(repository, resume_window_s=0.1) as server, Client(server.target) as client:
        stream = client.stream("accumulator")
        stream.open()
        step(stream, range(2))
        point = stream.resume_point
        stream.park()
        eventually(lambda: metric(server.metrics_url, "rnnserve_evictions_total", limit="resume_window_s") == 1)
        with pytest.raises(Evicted) as refusal, client.stream("accumulator", resume=point):
            pass
        assert refusal.value.metadata["limit"] == "resume_window_s"


def test_a_server_that_stands_still_for_longer_than_the_timeout_costs_only_time(repository: Path) -> None:
    with (
        start_server(repository) as server,
        Client(server.target, timeout_s=0.5) as client,
        client.stream("accumulator") as stream,
    ):
        step(stream, range(5))
        server.process.send_signal(signal.SIGSTOP)
        going_on = threading.Timer(2.0, server.process.send_signal, [signal.SIGCONT])
        going_on.start()
        step(stream, range(5, 10))
        going_on.join()


def test_a_close_that_could_not_be_stored_is_told_and_made_good(repository: Path, tmp_path: Path) -> None:
    told: SimpleQueue[Notice] = SimpleQueue()
    with (
        start_server(repository, tmp_path, store_timeout_s=0.3, checkpoint_interval_s=0.05) as server,
        Client(server.target) as client,
        client.stream("accumulator", on_notice=told.put) as stream,
    ):
        stream.step([1.0])
        eventually(lambda: bool(stream.step([1.0])) and stream.durable_step > 0)
        other = sqlite3.connect(tmp_path / "sessions.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        stream.close()
        assert told.get_nowait().reason == "not_erased"
        other.close()
        with pytest.raises(SessionNotFound):
            client.stream("accumulator", resume=stream.resume_point).open()
