"""Sessions that begin as copies of others, on the same server."""

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from rnnserve import Client, Evicted, ResumePoint, SessionLimit
from rnnserve.v1 import session_service_pb2 as pb
from rnnserve.v1.session_service_pb2_grpc import SessionServiceStub
from tests.support.bundles import accumulated
from tests.support.copies import parked, session_ids, sums_after
from tests.support.server import RunningServer, start_server
from tests.support.wire import TIMEOUT_S, live_stream, open_, refusal_of, resume

TOKEN = b"0123456789abcdef"
VALUES = [float(i % 3) for i in range(3_000)]
SUMS = accumulated(VALUES)


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def test_a_fork_has_the_state_after_exactly_its_steps_while_more_are_sent(client: Client) -> None:
    """The sums tell which steps the state has seen, and in which order."""
    enough = threading.Event()
    points: list[ResumePoint] = []
    seen: list[tuple[float, ...]] = []
    stream = client.stream("accumulator", session="forked-live")
    stream.open()

    def values_until_enough() -> Iterator[list[float]]:
        for value in VALUES:
            if enough.is_set():
                return
            yield [value]

    def step_all() -> None:
        seen.extend(tuple(answer.output.tolist()) for answer in stream.steps(values_until_enough()))

    stepping = threading.Thread(target=step_all)
    stepping.start()
    try:
        while len({point.answered_step for point in points} - {0}) < 5 and stepping.is_alive():
            points.append(client.fork_session("forked-live"))
    finally:
        enough.set()
        stepping.join(TIMEOUT_S)
    assert seen == SUMS[: len(seen)]  # the original knows nothing of it
    under_way = [point for point in points if 0 < point.answered_step < len(seen)]
    assert under_way
    for point in points:
        assert sums_after(client, point) == accumulated([*VALUES[: point.answered_step], 0.0])[-1]
    assert tuple(stream.step([0.0]).output.tolist()) == accumulated([*VALUES[: len(seen)], 0.0])[-1]
    stream.close()


def test_a_fork_and_its_original_go_different_ways(client: Client) -> None:
    original = parked(client, "two-ways", [1.0, 2.0])
    fork = client.fork_session("two-ways")
    assert sums_after(client, fork) == (3.0, 4.0)
    with client.stream("accumulator", resume=original) as stream:
        assert stream.next_step == 2
        assert stream.step([7.0]).output.tolist() == [10.0, 4.0]


def test_the_original_keeps_the_answers_that_it_owes_and_the_copy_has_none(server: RunningServer) -> None:
    opening, copy = open_("accumulator", "owing", token=TOKEN), open_("accumulator", "owing-copy", token=b"c" * 16)
    with grpc.insecure_channel(server.target) as channel:
        with live_stream(channel, opening) as stream:
            stream.step([[1.0], [2.0]])
            request = pb.ForkSessionRequest(
                session_id="owing", new_session_id="owing-copy", new_resume_token=copy.open.resume_token
            )
            forked = SessionServiceStub(channel).ForkSession(request, timeout=TIMEOUT_S).session
        assert (forked.next_step, forked.state, forked.size_bytes) == (2, pb.SESSION_STATE_PARKED, 4 * 2)
        with live_stream(channel, resume(opening)) as stream:
            assert stream.read().answer.next_step == 2
        with live_stream(channel) as stream, pytest.raises(grpc.RpcError) as ended:
            stream.ask(resume(copy, answered_step=1))
        assert refusal_of(ended.value).reason == "RESUME_POINT_LOST"


def test_a_copy_counts_as_a_session_but_not_as_a_stream(repository: Path) -> None:
    with (
        start_server(repository, max_sessions=2, max_streams=1, session_store="memory") as server,
        Client(server.target) as client,
    ):
        with client.stream("accumulator", session="live") as stream:
            stream.step([5.0])
            first = client.fork_session("live", session="first")
            second = client.fork_session("live", session="second")
            assert session_ids(client) == {"live", "second"}
        with pytest.raises(Evicted, match="max_sessions"):
            client.stream("accumulator", resume=first).open()
        with client.stream("accumulator", resume=second) as one:
            assert one.step([1.0]).output.tolist() == [6.0, 5.0]


def test_where_all_sessions_are_live_there_is_no_room_for_a_copy(repository: Path) -> None:
    with (
        start_server(repository, max_sessions=1) as server,
        Client(server.target) as client,
        client.stream("accumulator") as stream,
    ):
        with pytest.raises(SessionLimit):
            client.fork_session(stream.session)
        assert session_ids(client) == {stream.session}
