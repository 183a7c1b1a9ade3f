import json
import os
import signal
import sqlite3
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from rnnserve.v1.real_time_service_pb2 import NOTICE_REASON_DRAINING
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from rnnserve.v1.session_service_pb2 import DeleteSessionRequest, GetSessionRequest, ListSessionsRequest
from rnnserve.v1.session_service_pb2_grpc import SessionServiceStub
from tests.support.multiplexed import multiplexed
from tests.support.server import RunningServer, start_server
from tests.support.wire import (
    TIMEOUT_S,
    close,
    eventually,
    live_stream,
    metric,
    open_,
    predict,
    random_steps,
    refusal_of,
    steps,
)

STREAM = {"grpc_type": "bidi_stream", "grpc_service": "rnnserve.v1.RealTimeService", "grpc_method": "StreamSteps"}


def assert_draining(error: grpc.RpcError) -> None:
    refusal = refusal_of(error)
    assert (error.code(), refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert refusal.retry_after_s


def test_a_drain_answers_what_was_sent_refuses_what_is_new_and_ends_well(repository: Path) -> None:
    with start_server(repository, drain_timeout_s=60) as server, grpc.insecure_channel(server.target) as channel:
        whole = SequenceServiceStub(channel)
        with live_stream(channel, open_("vanilla", "live")) as stream, live_stream(channel) as late:
            running = whole.Predict.future(predict("stacked", [random_steps(20_000)]), timeout=TIMEOUT_S)
            eventually(lambda: metric(server.metrics_url, "rnnserve_queued_sequences") == 1)
            eventually(lambda: metric(server.metrics_url, "grpc_server_started_total", **STREAM) == 2)
            stream.send(*(steps(i, random_steps(1)) for i in range(50)))
            os.kill(server.lane_pid(), signal.SIGTERM)  # a service manager tells all processes
            server.terminate()

            responses = [stream.read() for _ in range(51)]
            (notice,) = [response.notice for response in responses if response.HasField("notice")]
            assert notice.reason == NOTICE_REASON_DRAINING
            assert 55 < notice.time_left.seconds < 60  # less what the end itself takes
            answers = [response.answer for response in responses if response.HasField("answer")]
            assert [answer.first_step for answer in answers] == list(range(50))

            with live_stream(channel) as refused, pytest.raises(grpc.RpcError) as ended:
                refused.ask(open_("vanilla", "new"))
            assert_draining(ended.value)
            with pytest.raises(grpc.RpcError) as ended:
                late.ask(open_("vanilla", "late"))
            assert_draining(ended.value)
            with pytest.raises(grpc.RpcError) as ended:
                whole.Predict(predict("vanilla", [random_steps(1)]), timeout=TIMEOUT_S)
            assert_draining(ended.value)

            (prediction,) = running.result().predictions
            assert list(prediction.outputs.shape) == [20_000, 2]
            stream.send(close())
            assert [response.closed.next_step for response in stream.rest()] == [50]
            assert stream.call.code() == grpc.StatusCode.OK
        start_s = time.monotonic()
        assert server.process.wait(30) == 0
        assert time.monotonic() - start_s < 30
        assert "Traceback" not in server.log()


def test_what_never_ends_is_ended_with_a_reason_at_the_deadline(repository: Path) -> None:
    with (
        start_server(repository, drain_timeout_s=0.5, max_sequence_steps=1_000_000) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        endless_work = SequenceServiceStub(channel).Predict.future(
            predict("bidirectional", [random_steps(300_000)]), timeout=120
        )
        eventually(lambda: metric(server.metrics_url, "rnnserve_queued_sequences") == 1)
        with live_stream(channel, open_("vanilla", "endless")) as stream:
            stream.step(random_steps(1))
            start_s = time.monotonic()
            server.terminate()
            assert stream.read().notice.time_left.nanos == 250_000_000
            with pytest.raises(grpc.RpcError) as ended:
                stream.read()
            assert_draining(ended.value)
            with pytest.raises(grpc.RpcError) as ended:
                endless_work.result()
            assert_draining(ended.value)
            assert server.process.wait(30) == 0
            assert time.monotonic() - start_s < 10  # the work alone would take longer
        assert "Traceback" not in server.log()


def test_streams_that_the_deadline_ends_are_counted_and_logged_as_drained(repository: Path) -> None:
    with (
        start_server(repository, drain_timeout_s=0.5) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, open_("vanilla", "alone")) as stream,
        multiplexed(channel) as call,
    ):
        call.open(0, "vanilla", "one-of-many")
        server.terminate()
        for rest in (stream.rest, call.rest):
            with pytest.raises(grpc.RpcError) as ended:
                rest()
            assert_draining(ended.value)
        assert server.process.wait(30) == 0
        reasons = {line.get("session", "all"): line["reason"] for line in logged(server) if "ended" in line["event"]}
    assert reasons == {"alone": "DRAINING", "one-of-many": "DRAINING", "all": "DRAINING"}


TOKEN = b"0123456789abcdef"


def logged(server: RunningServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log().splitlines()]


def logged_s(server: RunningServer, words: str) -> float:
    """When it was; the end of the process itself is not ours, and slow on a busy machine."""
    (line,) = [line for line in logged(server) if words in line["event"]]
    return datetime.fromisoformat(line["timestamp"]).timestamp()


def test_a_store_that_is_locked_holds_up_no_end(repository: Path, tmp_path: Path) -> None:
    with (
        start_server(repository, tmp_path, drain_timeout_s=1) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        with live_stream(channel, open_("accumulator", "a", token=TOKEN)) as stream:
            stream.step([[1.0]])
            stream.wait_until_durable(1)
            other = sqlite3.connect(tmp_path / "sessions.sqlite", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            stream.step([[1.0]])
            server.terminate()
            assert server.process.wait(30) == 0
            other.close()
        assert logged_s(server, "left to itself") - logged_s(server, "draining for") < 1.5
        assert "1 sessions could not be written" in server.log()
        assert "Traceback" not in server.log()


def test_a_drain_refuses_to_delete_sessions_and_still_tells_which_there_are(repository: Path) -> None:
    with start_server(repository, drain_timeout_s=60) as server, grpc.insecure_channel(server.target) as channel:
        sessions = SessionServiceStub(channel)
        with live_stream(channel, open_("accumulator", "a", token=TOKEN)) as stream:
            server.terminate()
            assert stream.read().notice.reason == NOTICE_REASON_DRAINING
            with pytest.raises(grpc.RpcError) as ended:
                sessions.DeleteSession(DeleteSessionRequest(session_id="a"), timeout=TIMEOUT_S)
            assert_draining(ended.value)
            sessions.GetSession(GetSessionRequest(session_id="a"), timeout=TIMEOUT_S)
            listed = sessions.ListSessions(ListSessionsRequest(), timeout=TIMEOUT_S)
            assert [session.session_id for session in listed.sessions] == ["a"]
            stream.send(close())
            stream.rest()
        assert server.process.wait(30) == 0


def test_a_server_of_one_process_drains_when_its_terminal_goes(repository: Path, tmp_path: Path) -> None:
    with start_server(repository, tmp_path) as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(TIMEOUT_S) == 0
        assert "drained" in server.log()
