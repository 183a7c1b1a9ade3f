"""What the real server writes to its log."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from models.recurrent import NetworkSpec
from rnnserve import Client
from rnnserve.v1 import model_service_pb2 as models_pb
from rnnserve.v1.model_service_pb2_grpc import ModelServiceStub
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from tests.support.bundles import features, manifest, write_bundle
from tests.support.server import RunningServer, start_server
from tests.support.wire import TIMEOUT_S, close, eventually, live_stream, open_, resume, steps

TOKEN = b"my-secret-token!"


@pytest.fixture(scope="module")
def logging_server(repository: Path) -> Iterator[RunningServer]:
    with start_server(repository, log_format="json") as running:
        yield running


def lines(server: RunningServer, event: str) -> list[dict[str, Any]]:
    """The log so far, of that event."""
    parsed = [json.loads(line) for line in server.log().splitlines()]
    return [line for line in parsed if line["event"] == event]


def ends_of(server: RunningServer, session: str) -> list[dict[str, Any]]:
    return [line for line in lines(server, "stream ended") if line["session"] == session]


def test_the_end_of_a_stream_is_one_line_with_what_it_was(logging_server: RunningServer) -> None:
    with grpc.insecure_channel(logging_server.target) as channel:
        call = RealTimeServiceStub(channel).StreamSteps
        requests = iter([open_("vanilla", "told", version=1), steps(0, [[1, 2, 3]] * 5), close()])
        answers = call(requests, metadata=(("x-request-id", "mine-7"),), timeout=TIMEOUT_S)
        received = sum(answer.ByteSize() for answer in answers)
        assert ("x-request-id", "mine-7") in [(key, value) for key, value in answers.initial_metadata()]
    eventually(lambda: len(ends_of(logging_server, "told")) == 1)
    (line,) = ends_of(logging_server, "told")
    assert (line["model"], line["steps"], line["reason"]) == ("vanilla/1", 5, "CLOSED")
    assert (line["request_id"], line["level"]) == ("mine-7", "info")
    assert line["sent_bytes"] == received
    assert line["received_bytes"] > 5 * 3 * 4  # five steps of three floats, and what is around them
    assert 0 < line["duration_s"] < TIMEOUT_S


def test_a_multiplexed_stream_that_is_left_in_order_was_closed_and_says_how_many_sessions_it_had(
    logging_server: RunningServer,
) -> None:
    with Client(logging_server.target) as client, client.multiplex("vanilla") as gateway:
        gateway.step(["first", "second", "third"], [[1.0, 2.0, 3.0]] * 3)
    eventually(lambda: bool(lines(logging_server, "multiplexed stream ended")))
    (line,) = lines(logging_server, "multiplexed stream ended")
    assert (line["reason"], line["sessions"]) == ("CLOSED", 3)
    own = [ends_of(logging_server, session)[0] for session in ("first", "second", "third")]
    for way in ("received_bytes", "sent_bytes"):
        shares = [end[way] for end in own]
        assert 4 * 3 < min(shares) <= max(shares) < 2 * min(shares)  # a step is three floats, an answer no fewer
        assert sum(shares) < line[way] + len(shares)  # which are rounded
    assert sum(end["received_bytes"] for end in own) >= 0.9 * line["received_bytes"]


def test_a_session_that_was_closed_was_closed_even_if_the_client_goes_at_once(logging_server: RunningServer) -> None:
    sessions = [f"brief-{i}" for i in range(40)]
    with grpc.insecure_channel(logging_server.target) as channel:
        for session in sessions:
            with live_stream(channel, open_("vanilla", session)) as stream:
                assert stream.ask(close()).HasField("closed")
                stream.call.cancel()
    eventually(lambda: all(ends_of(logging_server, session) for session in sessions))
    assert {ends_of(logging_server, session)[0]["reason"] for session in sessions} == {"CLOSED"}


def test_what_a_limit_did_to_a_session_is_in_the_log(repository: Path) -> None:
    with (
        start_server(
            repository, log_format="json", log_level="debug", idle_timeout_s=0.2, resume_window_s=0.2
        ) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, open_("vanilla", "slow", token=TOKEN)),
    ):
        eventually(lambda: bool(lines(server, "session evicted")))
        (taken,), (gone,) = ends_of(server, "slow"), lines(server, "session evicted")
    assert (taken["reason"], taken["limit"]) == ("EVICTED", "idle_timeout_s")
    assert (gone["session"], gone["limit"], gone["level"]) == ("slow", "resume_window_s", "debug")


def test_a_stream_without_a_name_is_given_one(logging_server: RunningServer) -> None:
    with grpc.insecure_channel(logging_server.target) as channel:
        for session in ("one", "two"):
            with live_stream(channel, open_("vanilla", session)) as stream:
                stream.ask(close())
    eventually(lambda: all(ends_of(logging_server, session) for session in ("one", "two")))
    one, two = (ends_of(logging_server, session)[0]["request_id"] for session in ("one", "two"))
    assert len(one) == len(two) == 32
    assert one != two


def test_a_message_that_is_too_large_counts_among_those_received(repository: Path) -> None:
    too_large = steps(0, [[1, 2, 3]] * 1_000)
    with (
        start_server(repository, log_format="json", max_message_bytes=1_024) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        with live_stream(channel, open_("vanilla", "large")) as stream:
            assert "MESSAGE_TOO_LARGE" in str(stream.ask(too_large).error)
            stream.ask(close())
        eventually(lambda: bool(ends_of(server, "large")))
        (line,) = ends_of(server, "large")
    assert line["received_bytes"] > too_large.ByteSize() > 1_024


def test_neither_inputs_nor_tokens_are_in_the_log(logging_server: RunningServer) -> None:
    signal_level(logging_server, signal.SIGUSR1)
    opening = open_("text", "careful", token=TOKEN)
    with grpc.insecure_channel(logging_server.target) as channel:
        with live_stream(channel, opening) as stream:
            stream.step("abcba")
            stream.ask(steps(5, "Zürich"))  # a symbol that the model does not know
        with live_stream(channel, resume(opening)) as stream:
            stream.ask(close())
        eventually(lambda: len(ends_of(logging_server, "careful")) == 2)
    log = logging_server.log()
    assert "UNKNOWN_SYMBOL" in log
    for secret in (TOKEN.decode(), TOKEN.hex(), "abcba", "Zürich", "Z\\u00fcrich"):
        assert secret not in log


def test_signals_change_how_much_is_logged(logging_server: RunningServer) -> None:
    def calls() -> int:
        return len(lines(logging_server, "call ended"))

    with grpc.insecure_channel(logging_server.target) as channel:

        def one_more_is_logged() -> bool:
            before = calls()
            ModelServiceStub(channel).ListModels(models_pb.ListModelsRequest(), timeout=TIMEOUT_S)
            return calls() > before

        signal_level(logging_server, signal.SIGUSR1)
        eventually(one_more_is_logged)
        signal_level(logging_server, signal.SIGUSR2)
        eventually(lambda: not one_more_is_logged())


def test_the_lane_of_a_server_follows_the_signal(tmp_path: Path) -> None:
    large = NetworkSpec(cell="lstm", features=3, hidden_size=384, outputs=2)  # the lane logs how it computes such a one
    write_bundle(tmp_path, manifest("one", large, features(3)))
    with start_server(tmp_path, log_format="json") as server, Client(server.target) as client:
        assert not lane_lines(server)
        signal_level(server, signal.SIGUSR1)
        write_bundle(tmp_path, manifest("another", large, features(3)))
        client.load_model("another")
        eventually(lambda: bool(lane_lines(server)))


def lane_lines(server: RunningServer) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in server.log().splitlines()]
    return [line for line in parsed if line["logger"] == "service.engine.sequence_network"]


def test_all_processes_of_a_service_follow_the_signal(repository: Path) -> None:
    with start_server(repository, workers=2, log_format="json") as server:
        signal_level(server, signal.SIGUSR1)
        pids = set[int]()

        def both_have_logged() -> bool:
            with grpc.insecure_channel(server.target) as channel:
                ModelServiceStub(channel).ListModels(models_pb.ListModelsRequest(), timeout=TIMEOUT_S)
            pids.update(line["pid"] for line in lines(server, "call ended"))
            return len(pids) == 2

        eventually(both_have_logged)
        assert pids == set(server.children("service.worker"))


def test_a_person_gets_lines_to_read(repository: Path) -> None:
    with start_server(repository, log_format="text") as server:
        assert "serving" in server.log()
        with pytest.raises(json.JSONDecodeError):
            json.loads(server.log().splitlines()[0])


def signal_level(server: RunningServer, number: signal.Signals) -> None:
    server.process.send_signal(number)
