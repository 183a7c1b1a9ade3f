import time
from pathlib import Path

import grpc
import pytest

from rnnserve.v1.real_time_service_pb2 import NOTICE_REASON_DRAINING
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from tests.support.server import start_server
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
