import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator

import grpc
import pytest

from rnnserve import Client
from rnnserve.v1 import model_service_pb2 as models_pb
from rnnserve.v1.model_service_pb2_grpc import ModelServiceStub
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from tests.support.server import RunningServer
from tests.support.wire import (
    TIMEOUT_S,
    close,
    eventually,
    live_stream,
    metric,
    open_,
    predict,
    random_steps,
    resume,
    sample_values,
    steps,
    total_of,
)

VANILLA = {"model": "vanilla", "version": "1"}
STREAM = {"grpc_type": "bidi_stream", "grpc_service": "rnnserve.v1.RealTimeService", "grpc_method": "StreamSteps"}
PREDICT = {"grpc_type": "unary", "grpc_service": "rnnserve.v1.SequenceService", "grpc_method": "Predict"}

Growth = Callable[..., float]


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture
def growth(server: RunningServer) -> Growth:
    """How much a metric has grown since the test began."""
    before = sample_values(server.metrics_url)

    def grown(name: str, **labels: str) -> float:
        return metric(server.metrics_url, name, **labels) - total_of(before, name, **labels)

    return grown


def test_a_stream_is_counted_by_steps_messages_and_sessions(channel: grpc.Channel, growth: Growth) -> None:
    with live_stream(channel, open_("vanilla", "counted", version=1)) as stream:
        stream.step(random_steps(5))
        stream.step(random_steps(2))
        stream.ask(close())
        stream.rest()
    assert growth("rnnserve_steps_total", **VANILLA) == 7
    assert growth("rnnserve_step_seconds_count", **VANILLA) == 2
    assert growth("rnnserve_step_seconds_sum", **VANILLA) > 0
    assert growth("rnnserve_tick_sessions_sum", **VANILLA) == 7
    assert growth("rnnserve_tick_seconds_count", **VANILLA) == 7
    assert growth("rnnserve_step_queue_seconds_count", **VANILLA) == 7  # each step of a message waits for its tick
    assert growth("rnnserve_step_send_seconds_count", **VANILLA) == 2
    parts = ("rnnserve_step_queue_seconds_sum", "rnnserve_tick_seconds_sum", "rnnserve_step_send_seconds_sum")
    assert 0 < sum(growth(part, **VANILLA) for part in parts) <= growth("rnnserve_step_seconds_sum", **VANILLA)
    assert growth("rnnserve_sessions_opened_total", **VANILLA) == 1
    assert growth("rnnserve_streams_ended_total", **VANILLA, reason="CLOSED") == 1
    assert growth("grpc_server_started_total", **STREAM) == 1
    assert growth("grpc_server_msg_received_total", **STREAM) == 4
    assert growth("grpc_server_msg_sent_total", **STREAM) == 4
    assert growth("grpc_server_handled_total", **STREAM, grpc_code="OK") == 1
    assert growth("grpc_server_handling_seconds_count", **STREAM) == 1


def test_a_multiplexed_step_is_timed_once_it_is_sent(server: RunningServer, growth: Growth) -> None:
    with Client(server.target) as client, client.multiplex("vanilla", version=1) as gateway:
        for x in random_steps(3):
            assert not gateway.step(["timed-1", "timed-2"], [x, x]).errors
        assert growth("rnnserve_steps_total", **VANILLA) == 6
        assert growth("rnnserve_step_seconds_count", **VANILLA) == growth("rnnserve_step_send_seconds_count", **VANILLA)
        assert 3 <= growth("rnnserve_step_seconds_count", **VANILLA) <= 6
    assert growth("rnnserve_streams_ended_total", **VANILLA, reason="CLOSED") == 2


def test_a_stream_whose_client_has_gone_ends_for_that_reason_and_its_session_is_parked(
    server: RunningServer, channel: grpc.Channel, growth: Growth
) -> None:
    with live_stream(channel, open_("vanilla", "left", version=1, token=b"0123456789abcdef")) as stream:
        stream.step(random_steps(1))
    eventually(lambda: growth("rnnserve_streams_ended_total", **VANILLA, reason="CLIENT_GONE") == 1)
    eventually(lambda: growth("rnnserve_parked_sessions", **VANILLA) >= 1)
    eventually(lambda: growth("rnnserve_store_seconds_count", operation="write") >= 1)


def test_a_session_that_another_stream_takes_ends_the_first_stream_for_that_reason(
    channel: grpc.Channel, growth: Growth
) -> None:
    opening = open_("vanilla", "taken", version=1, token=b"0123456789abcdef")
    with live_stream(channel, opening) as first:
        first.step(random_steps(1))
        with live_stream(channel, resume(opening)):
            eventually(lambda: growth("rnnserve_streams_ended_total", **VANILLA, reason="SESSION_MOVED") == 1)


def test_whole_sequences_are_counted_by_sequence_and_batch(
    server: RunningServer, channel: grpc.Channel, growth: Growth
) -> None:
    stub = SequenceServiceStub(channel)
    stub.Predict(predict("vanilla", [random_steps(3)] * 4, version=1), timeout=TIMEOUT_S)
    assert growth("rnnserve_sequences_total", **VANILLA) == 4
    assert growth("rnnserve_batch_sequences_sum", **VANILLA) == 4
    assert 1 <= growth("rnnserve_batch_seconds_count", **VANILLA) <= 4  # not all four need be there when it begins
    assert growth("rnnserve_batch_steps_total", **VANILLA) == 12
    assert growth("rnnserve_batch_padding_total", **VANILLA) == 0
    assert growth("rnnserve_sequence_queue_seconds_count", **VANILLA) == 4
    assert growth("rnnserve_sequence_seconds_count", **VANILLA) == 1
    assert growth("grpc_server_handled_total", **PREDICT, grpc_code="OK") == 1
    assert metric(server.metrics_url, "rnnserve_queued_sequences") == 0


def test_refusals_are_counted_by_reason_in_a_stream_and_at_its_end(channel: grpc.Channel, growth: Growth) -> None:
    with live_stream(channel, open_("vanilla", "refused", version=1)) as stream:
        stream.ask(steps(0, [[1, 2]]))
        stream.ask(steps(9, [[1, 2, 3]]))
    with pytest.raises(grpc.RpcError):
        SequenceServiceStub(channel).Predict(predict("nobody", [random_steps(1)]), timeout=TIMEOUT_S)
    for reason in ("SHAPE_MISMATCH", "STEP_OUT_OF_ORDER", "MODEL_NOT_FOUND"):
        assert growth("rnnserve_refusals_total", reason=reason) == 1
    assert growth("grpc_server_handled_total", **PREDICT, grpc_code="NOT_FOUND") == 1


def test_every_served_model_is_listed(server: RunningServer, channel: grpc.Channel) -> None:
    for model in ModelServiceStub(channel).ListModels(models_pb.ListModelsRequest(), timeout=TIMEOUT_S).models:
        labels = {"model": model.name, "version": str(model.version)}
        assert metric(server.metrics_url, "rnnserve_models", **labels) == 1
        assert metric(server.metrics_url, "rnnserve_model_bytes", **labels) > 0
        assert metric(server.metrics_url, "rnnserve_model_load_seconds", **labels) > 0


def test_no_label_holds_what_a_client_chose(server: RunningServer, channel: grpc.Channel) -> None:
    with live_stream(channel, open_("vanilla", "my-very-own-session")) as stream:
        stream.step(random_steps(1))
    with live_stream(channel) as stream, pytest.raises(grpc.RpcError):
        stream.ask(open_("my-very-own-model", "s"))
    with urllib.request.urlopen(server.metrics_url, timeout=TIMEOUT_S) as page:
        assert b"my-very-own" not in page.read()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on the PATH")
def test_promtool_finds_nothing_to_complain_about(server: RunningServer) -> None:
    with urllib.request.urlopen(server.metrics_url, timeout=TIMEOUT_S) as page:
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=page.read(), capture_output=True, timeout=TIMEOUT_S
        )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
