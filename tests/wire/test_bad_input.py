"""What bad input gets: the reason, the field and the limit, and nobody else is disturbed."""

import itertools
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest

from rnnserve.v1 import model_service_pb2 as models_pb
from rnnserve.v1.model_service_pb2_grpc import ModelServiceStub
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.sequence_service_pb2 import OpenPredictStream, PredictRequest, PredictStreamRequest, Sequence
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from rnnserve.v1.tensor_pb2 import DATA_TYPE_UNSPECIFIED
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer
from tests.support.wire import (
    TIMEOUT_S,
    Refusal,
    Request,
    array,
    close,
    eventually,
    live_stream,
    metric,
    open_,
    predict,
    random_steps,
    refusal_of,
    reset,
    sequence,
    steps,
)

Code = grpc.StatusCode
NAN, INFINITY = float("nan"), float("inf")
GOOD: dict[str, Any] = {"vanilla": random_steps(3), "stacked": random_steps(3), "text": "abc"}
MORE: dict[str, Any] = {"vanilla": random_steps(4, seed=1), "stacked": random_steps(4, seed=1), "text": "cab "}
FOLDERS = {"vanilla": "vanilla/2", "stacked": "stacked/1", "text": "text/1"}
names = (f"session-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def channel(small_server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(small_server.target) as channel:
        yield channel


@pytest.fixture(autouse=True)
def _room_for_sessions(small_server: RunningServer) -> None:
    """Those of the test before are gone."""
    eventually(lambda: open_sessions(small_server) == 0)


def open_sessions(server: RunningServer) -> int:
    versions = [("vanilla", "1"), ("vanilla", "2"), ("text", "1"), ("stacked", "1")]
    return sum(
        int(metric(server.metrics_url, "rnnserve_sessions", model=model, version=version))
        for model, version in versions
    )


def shaped(*shape: int, values: Any = ((0, 0, 0), (0, 0, 0))) -> Request:
    """Steps 3… whose shape says something else than their bytes."""
    message = steps(3, values)
    del message.steps.tensor.shape[:]
    message.steps.tensor.shape.extend(shape)
    return message


def typed(data_type: int) -> Request:
    message = steps(3, [[0, 0, 0]])
    message.steps.tensor.data_type = data_type  # type: ignore[assignment]
    return message


def no_input() -> Request:
    message = steps(3, "")
    message.steps.ClearField("text")
    return message


class Row(NamedTuple):
    """A message behind 3 good steps, and its refusal."""

    message: Request
    reason: str
    field: str | None
    metadata: Mapping[str, str] = MappingProxyType({})
    code: grpc.StatusCode = Code.INVALID_ARGUMENT
    model: str = "vanilla"


AHEAD = {"expected_step": "3"}
IN_A_STREAM = {
    "type not said": Row(typed(DATA_TYPE_UNSPECIFIED), "DATA_TYPE_MISMATCH", "steps.tensor.data_type"),
    "type unknown": Row(typed(77), "DATA_TYPE_MISMATCH", "steps.tensor.data_type"),
    "rank 1": Row(shaped(6), "SHAPE_MISMATCH", "steps.tensor.shape", {"features": "3"}),
    "rank 3": Row(shaped(1, 2, 3), "SHAPE_MISMATCH", "steps.tensor.shape", {"features": "3"}),
    "width": Row(steps(3, [[1, 2]]), "SHAPE_MISMATCH", "steps.tensor.shape", {"features": "3"}),
    "fewer bytes": Row(shaped(3, 3), "SHAPE_MISMATCH", "steps.tensor.data"),
    "more bytes": Row(shaped(1, 3), "SHAPE_MISMATCH", "steps.tensor.data"),
    "negative": Row(shaped(-2, 3), "STEPS_MISSING", "steps.tensor.shape"),
    "negative width": Row(shaped(2, -3), "SHAPE_MISMATCH", "steps.tensor.shape", {"features": "3"}),
    "no steps": Row(steps(3, np.zeros((0, 3))), "STEPS_MISSING", "steps.tensor.shape"),
    "no text": Row(steps(3, ""), "STEPS_MISSING", "steps.text", model="text"),
    "no input": Row(no_input(), "STEPS_MISSING", "steps.input"),
    "too many steps": Row(steps(3, np.zeros((51, 3))), "TOO_MANY_STEPS", "steps.tensor.shape", {"limit": "50"}),
    "too long a text": Row(steps(3, "a" * 51), "TOO_MANY_STEPS", "steps.text", {"limit": "50"}, model="text"),
    "NaN": Row(steps(3, [[0, NAN, 0]]), "NOT_FINITE", "steps.tensor.data", {"step": "0", "feature": "1"}),
    "infinity": Row(steps(3, [[0, 0, INFINITY]]), "NOT_FINITE", "steps.tensor.data", {"step": "0", "feature": "2"}),
    "infinity where NaN is held": Row(
        steps(3, [[NAN, 0, 0], [-INFINITY, 0, 0]]),
        "NOT_FINITE",
        "steps.tensor.data",
        {"step": "1", "feature": "0"},
        model="stacked",
    ),
    "unknown symbol": Row(steps(3, "ab!"), "UNKNOWN_SYMBOL", "steps.text", {"symbol": "!", "place": "2"}, model="text"),
    "text to numeric": Row(steps(3, "abc"), "INPUT_KIND_MISMATCH", "steps.text"),
    "numbers to text": Row(steps(3, [[0, 0, 0]]), "INPUT_KIND_MISMATCH", "steps.tensor", model="text"),
    "second open": Row(open_("vanilla", "second"), "OPEN_REPEATED", "open"),
    "empty": Row(Request(), "FIELD_INVALID", "request"),
    "no first_step": Row(steps(None, [[0, 0, 0]]), "FIELD_INVALID", "steps.first_step"),
    "gap": Row(steps(4, [[0, 0, 0]]), "STEP_OUT_OF_ORDER", "steps.first_step", AHEAD, Code.ABORTED),
    "reset out of order": Row(reset(2), "STEP_OUT_OF_ORDER", "reset.first_step", AHEAD, Code.ABORTED),
    "reset without an index": Row(reset(None), "FIELD_INVALID", "reset.first_step"),
    "too large": Row(steps(3, "a" * 5_000), "MESSAGE_TOO_LARGE", "request", {"limit": "4096"}, model="text"),
}


def assert_refused(refusal: Refusal, code: grpc.StatusCode, reason: str, field: str | None) -> None:
    assert (refusal.code, refusal.reason, refusal.field) == (code.value[0], reason, field)
    assert refusal.message


@contextmanager
def undisturbed(channel: grpc.Channel, repository: Path, model: str) -> Iterator[None]:
    """A stream that is open and stepped before and behind what happens, and goes on as if it had not."""
    with live_stream(channel, open_(model, next(names))) as stream:
        before = stream.step(GOOD[model])
        yield
        after = stream.step(MORE[model])
    assert_close(np.concatenate([before, after]), whole(repository, model))


def whole(repository: Path, model: str) -> np.ndarray[Any, Any]:
    parts = GOOD[model], MORE[model]
    values = "".join(parts) if model == "text" else np.concatenate(parts)
    return Reference(repository / FOLDERS[model]).predict(values)


@pytest.mark.parametrize("name", IN_A_STREAM)
def test_a_bad_message_is_answered_in_the_stream_and_changes_nothing(
    channel: grpc.Channel, repository: Path, name: str
) -> None:
    row = IN_A_STREAM[name]
    with undisturbed(channel, repository, row.model), live_stream(channel, open_(row.model, next(names))) as stream:
        before = stream.step(GOOD[row.model])
        response = stream.ask(row.message)
        assert response.WhichOneof("response") == "error"
        refusal = Refusal(response.error)
        assert_refused(refusal, row.code, row.reason, row.field)
        assert refusal.metadata == row.metadata
        after = stream.step(MORE[row.model])
        assert stream.ask(close()).closed.next_step == 7
    assert_close(np.concatenate([before, after]), whole(repository, row.model))


def test_what_is_sent_behind_a_refused_message_is_refused_too(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("vanilla", next(names))) as stream:
        stream.send(steps(0, [[1, NAN, 1]]), steps(1, [[1, 1, 1]]), reset(2), steps(0, [[1, 1, 1]]))
        reasons = [Refusal(stream.read().error).reason for _ in range(3)]
        assert reasons == ["NOT_FINITE", "STEP_OUT_OF_ORDER", "STEP_OUT_OF_ORDER"]
        assert stream.read().answer.next_step == 1


class Opening(NamedTuple):
    """The first message of a call, and how the call ends."""

    message: Request
    reason: str
    field: str | None
    code: grpc.StatusCode = Code.INVALID_ARGUMENT


OPENINGS = {
    "steps before open": Opening(steps(0, [[0, 0, 0]]), "OPEN_MISSING", "open"),
    "close before open": Opening(close(), "OPEN_MISSING", "open"),
    "empty before open": Opening(Request(), "OPEN_MISSING", "open"),
    "unknown model": Opening(open_("nobody", "s"), "MODEL_NOT_FOUND", "open.model", Code.NOT_FOUND),
    "unknown version": Opening(open_("vanilla", "s", version=9), "MODEL_NOT_FOUND", "open.version", Code.NOT_FOUND),
    "a name of a page": Opening(open_("ü" * 1_900, "s"), "MODEL_NOT_FOUND", "open.model", Code.NOT_FOUND),
    "no session id": Opening(open_("vanilla", ""), "FIELD_INVALID", "open.session_id"),
    "space in the session id": Opening(open_("vanilla", "pump 7"), "FIELD_INVALID", "open.session_id"),
    "newline behind the session id": Opening(open_("vanilla", "pump\n"), "FIELD_INVALID", "open.session_id"),
    "letter that is not ASCII": Opening(open_("vanilla", "pümp"), "FIELD_INVALID", "open.session_id"),
    "long session id": Opening(open_("vanilla", "x" * 129), "FIELD_INVALID", "open.session_id"),
    "too large": Opening(open_("vanilla", "x" * 5_000), "MESSAGE_TOO_LARGE", "request"),
    "unknown selection": Opening(open_("vanilla", "s", steps=9), "FIELD_INVALID", "open.options.steps"),
    "more labels than there are": Opening(open_("vanilla", "s", top_k=5), "FIELD_INVALID", "open.options.top_k"),
    "labels of none": Opening(open_("stacked", "s", top_k=1), "FIELD_INVALID", "open.options.top_k"),
    "chances of none": Opening(
        open_("stacked", "s", probabilities=True), "FIELD_INVALID", "open.options.probabilities"
    ),
    "threshold of none": Opening(open_("stacked", "s", threshold=0.5), "FIELD_INVALID", "open.options.threshold"),
    "threshold above 1": Opening(open_("vanilla", "s", threshold=1.5), "FIELD_INVALID", "open.options.threshold"),
    "threshold below 0": Opening(open_("vanilla", "s", threshold=-1), "FIELD_INVALID", "open.options.threshold"),
    "threshold that is no number": Opening(
        open_("vanilla", "s", threshold=NAN), "FIELD_INVALID", "open.options.threshold"
    ),
    "bidirectional": Opening(open_("bidirectional", "s"), "MODEL_NOT_STREAMABLE", None, Code.FAILED_PRECONDITION),
}


@pytest.mark.parametrize("name", OPENINGS)
def test_a_bad_open_ends_its_call_and_no_other(
    small_server: RunningServer, channel: grpc.Channel, repository: Path, name: str
) -> None:
    row = OPENINGS[name]
    with undisturbed(channel, repository, "vanilla"):
        with live_stream(channel) as stream, pytest.raises(grpc.RpcError) as ended:
            stream.ask(row.message)
        assert ended.value.code() == row.code
        assert_refused(refusal_of(ended.value), row.code, row.reason, row.field)
        assert open_sessions(small_server) == 1


def test_a_call_without_a_message_is_refused(channel: grpc.Channel) -> None:
    with live_stream(channel) as stream:
        stream.half_close()
        with pytest.raises(grpc.RpcError) as ended:
            stream.read()
    assert refusal_of(ended.value).reason == "OPEN_MISSING"


def test_a_session_id_of_every_allowed_character_is_taken(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("vanilla", "AZaz09._-:" + "x" * 118)) as stream:
        assert len(stream.step(GOOD["vanilla"])) == 3


def test_a_session_id_in_use_is_refused_and_its_owner_goes_on(channel: grpc.Channel, repository: Path) -> None:
    with live_stream(channel, open_("vanilla", "mine")) as owner:
        before = owner.step(GOOD["vanilla"])
        with live_stream(channel) as thief, pytest.raises(grpc.RpcError) as ended:
            thief.ask(open_("vanilla", "mine"))
        assert_refused(refusal_of(ended.value), Code.ALREADY_EXISTS, "SESSION_EXISTS", "open.session_id")
        assert refusal_of(ended.value).metadata == {"session_id": "mine"}
        after = owner.step(MORE["vanilla"])
    assert_close(np.concatenate([before, after]), whole(repository, "vanilla"))


def test_a_session_over_the_limit_is_refused_until_another_one_ends(channel: grpc.Channel) -> None:
    with ExitStack() as stack:
        streams = [stack.enter_context(live_stream(channel, open_("vanilla", next(names)))) for _ in range(4)]
        with live_stream(channel) as fifth, pytest.raises(grpc.RpcError) as ended:
            fifth.ask(open_("vanilla", next(names)))
        refusal = refusal_of(ended.value)
        assert_refused(refusal, Code.RESOURCE_EXHAUSTED, "SESSION_LIMIT", None)
        assert refusal.metadata == {"limit": "4"}
        assert refusal.retry_after_s
        streams[0].ask(close())
        streams[0].rest()
        with live_stream(channel, open_("vanilla", next(names))) as fifth:
            fifth.step(GOOD["vanilla"])
        assert all(len(stream.step(GOOD["vanilla"])) == 3 for stream in streams[1:])


def test_a_cancelled_call_ends_its_session_and_no_other(
    small_server: RunningServer, channel: grpc.Channel, repository: Path
) -> None:
    with undisturbed(channel, repository, "vanilla"):
        with live_stream(channel, open_("vanilla", "cancelled")) as stream:
            stream.send(*(steps(50 * i, np.ones((50, 3))) for i in range(20)))
            stream.read()
            stream.call.cancel()
        eventually(lambda: open_sessions(small_server) == 1)
        with live_stream(channel, open_("vanilla", "cancelled")) as again:
            assert_close(again.step(GOOD["vanilla"]), whole(repository, "vanilla")[:3])


CALLS = "grpc_server_handled_total"
STREAM = {"grpc_type": "bidi_stream", "grpc_service": "rnnserve.v1.RealTimeService", "grpc_method": "StreamSteps"}


def test_a_cancelled_stream_is_counted_as_cancelled(small_server: RunningServer, channel: grpc.Channel) -> None:
    before = {code: metric(small_server.metrics_url, CALLS, **STREAM, grpc_code=code) for code in ("OK", "CANCELLED")}
    with live_stream(channel, open_("vanilla", "counted")) as stream:
        stream.step(GOOD["vanilla"])
        stream.call.cancel()
    eventually(
        lambda: metric(small_server.metrics_url, CALLS, **STREAM, grpc_code="CANCELLED") == before["CANCELLED"] + 1
    )
    assert metric(small_server.metrics_url, CALLS, **STREAM, grpc_code="OK") == before["OK"]


def test_bytes_that_are_no_message_are_refused_with_a_reason(channel: grpc.Channel) -> None:
    unary_call: Any = channel.unary_unary("/rnnserve.v1.SequenceService/Predict")
    with pytest.raises(grpc.RpcError) as ended:
        unary_call(b"\xff\xff", timeout=TIMEOUT_S)
    assert_refused(refusal_of(ended.value), Code.INVALID_ARGUMENT, "MESSAGE_MALFORMED", None)
    stream_call: Any = channel.stream_stream("/rnnserve.v1.RealTimeService/StreamSteps")
    with pytest.raises(grpc.RpcError) as ended:
        list(stream_call(iter([b"\xff\xff"]), timeout=TIMEOUT_S))
    assert_refused(refusal_of(ended.value), Code.INVALID_ARGUMENT, "MESSAGE_MALFORMED", None)


def test_a_client_that_vanishes_ends_its_session_and_no_other(
    small_server: RunningServer, channel: grpc.Channel, repository: Path
) -> None:
    with undisturbed(channel, repository, "vanilla"):
        gone = grpc.insecure_channel(small_server.target, options=[("grpc.use_local_subchannel_pool", 1)])
        with live_stream(gone, open_("vanilla", "vanishing")) as stream:
            stream.step(GOOD["vanilla"])
            stream.send(*(steps(3 + i, np.ones((1, 3))) for i in range(200)))
            assert open_sessions(small_server) == 2
            gone.close()
        eventually(lambda: open_sessions(small_server) == 1)


def unary(model: str = "vanilla", *bad: Sequence, version: int = 0, **options: Any) -> PredictRequest:
    """One good sequence, then the bad ones."""
    good = sequence(GOOD.get(model, GOOD["vanilla"]))
    return PredictRequest(model=model, version=version, sequences=[good, *bad], options=OutputOptions(**options))


class Whole(NamedTuple):
    """A request of whole sequences, and its refusal."""

    message: PredictRequest
    reason: str
    field: str | None
    metadata: Mapping[str, str] = MappingProxyType({})
    code: grpc.StatusCode = Code.INVALID_ARGUMENT


def of_rank(rank: int) -> Sequence:
    message = sequence([[0, 0, 0]])
    message.tensor.shape.extend([1] * (rank - 2))
    return message


WHOLE = {
    "no sequences": Whole(predict("vanilla", []), "FIELD_INVALID", "sequences", {"limit": "4"}),
    "too many sequences": Whole(
        predict("vanilla", [GOOD["vanilla"]] * 5), "FIELD_INVALID", "sequences", {"limit": "4"}
    ),
    "no input": Whole(unary("vanilla", Sequence()), "STEPS_MISSING", "sequences[1].input"),
    "no steps": Whole(unary("vanilla", sequence(np.zeros((0, 3)))), "STEPS_MISSING", "sequences[1].tensor.shape"),
    "too many steps": Whole(
        unary("vanilla", sequence(np.zeros((101, 3)))),
        "TOO_MANY_STEPS",
        "sequences[1].tensor.shape",
        {"limit": "100"},
    ),
    "width": Whole(
        unary("vanilla", sequence([[0, 0]])), "SHAPE_MISMATCH", "sequences[1].tensor.shape", {"features": "3"}
    ),
    "rank 1000": Whole(
        unary("vanilla", of_rank(1_000)), "SHAPE_MISMATCH", "sequences[1].tensor.shape", {"features": "3"}
    ),
    "type": Whole(
        unary("vanilla", Sequence(tensor={"shape": [1, 3], "data": bytes(12)})),  # type: ignore[arg-type]
        "DATA_TYPE_MISMATCH",
        "sequences[1].tensor.data_type",
    ),
    "NaN": Whole(
        unary("vanilla", sequence([[0.0, 0.0, 0.0], [0.0, 0.0, NAN]])),
        "NOT_FINITE",
        "sequences[1].tensor.data",
        {"step": "1", "feature": "2"},
    ),
    "infinity": Whole(
        unary("bidirectional", sequence([[-INFINITY, 0, 0]])),
        "NOT_FINITE",
        "sequences[1].tensor.data",
        {"step": "0", "feature": "0"},
    ),
    "symbol": Whole(
        unary("text", sequence("aB")), "UNKNOWN_SYMBOL", "sequences[1].text", {"symbol": "B", "place": "1"}
    ),
    "text": Whole(unary("vanilla", sequence("abc")), "INPUT_KIND_MISMATCH", "sequences[1].text"),
    "numbers": Whole(unary("text", sequence([[0, 0, 0]])), "INPUT_KIND_MISMATCH", "sequences[1].tensor"),
    "model": Whole(unary("nobody"), "MODEL_NOT_FOUND", "model", {"model": "nobody"}, Code.NOT_FOUND),
    "version": Whole(
        unary("vanilla", version=9), "MODEL_NOT_FOUND", "version", {"model": "vanilla", "version": "9"}, Code.NOT_FOUND
    ),
    "steps of a mean": Whole(unary("bidirectional", steps=1), "FIELD_INVALID", "options.steps"),
    "selection": Whole(unary("vanilla", steps=9), "FIELD_INVALID", "options.steps"),
    "labels": Whole(unary("stacked", top_k=1), "FIELD_INVALID", "options.top_k", {"limit": "0"}),
    "threshold of none": Whole(unary("stacked", threshold=0.5), "FIELD_INVALID", "options.threshold"),
    "threshold": Whole(unary("vanilla", threshold=1.5), "FIELD_INVALID", "options.threshold", {"limit": "1"}),
    "too large": Whole(unary("text", sequence("a" * 5_000)), "MESSAGE_TOO_LARGE", "request", {"limit": "4096"}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_bad_request_of_whole_sequences_is_refused_as_a_whole(
    channel: grpc.Channel, repository: Path, name: str
) -> None:
    row = WHOLE[name]
    stub = SequenceServiceStub(channel)
    with undisturbed(channel, repository, "vanilla"), pytest.raises(grpc.RpcError) as ended:
        stub.Predict(row.message, timeout=TIMEOUT_S)
    refusal = refusal_of(ended.value)
    assert_refused(refusal, row.code, row.reason, row.field)
    assert refusal.metadata == row.metadata


def test_a_bulk_open_above_the_limit_is_refused(channel: grpc.Channel) -> None:
    request = PredictStreamRequest(open=OpenPredictStream(model="x" * 5_000))
    with pytest.raises(grpc.RpcError) as ended:
        list(SequenceServiceStub(channel).PredictStream(iter([request]), timeout=TIMEOUT_S))
    assert_refused(refusal_of(ended.value), Code.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE", "request")


def test_the_reason_arrives_even_where_the_request_is_huge(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as ended:
        ModelServiceStub(channel).GetModel(models_pb.GetModelRequest(model="ü" * 100_000), timeout=TIMEOUT_S)
    assert_refused(refusal_of(ended.value), Code.NOT_FOUND, "MODEL_NOT_FOUND", "model")


lane_can_be_stopped = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the lane's process in /proc")


@contextmanager
def stopped_lane(server: RunningServer) -> Iterator[int]:
    """Nothing whole is computed meanwhile."""
    pid = server.lane_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)


@lane_can_be_stopped
def test_a_full_queue_refuses_whole_sequences_but_no_live_step(
    small_server: RunningServer, channel: grpc.Channel, repository: Path
) -> None:
    stub = SequenceServiceStub(channel)
    with stopped_lane(small_server):
        held = stub.Predict.future(predict("vanilla", [random_steps(2)] * 3), timeout=TIMEOUT_S)
        eventually(lambda: metric(small_server.metrics_url, "rnnserve_queued_sequences") == 3)
        with undisturbed(channel, repository, "vanilla"), pytest.raises(grpc.RpcError) as ended:
            stub.Predict(predict("vanilla", [random_steps(2)] * 2), timeout=TIMEOUT_S)
    refusal = refusal_of(ended.value)
    assert_refused(refusal, Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", None)
    assert refusal.metadata == {"limit": "4"}
    assert refusal.retry_after_s
    assert len(held.result().predictions) == 3


@lane_can_be_stopped
def test_a_lost_lane_fails_what_it_held_and_the_next_request_works(
    small_server: RunningServer, channel: grpc.Channel, repository: Path
) -> None:
    stub = SequenceServiceStub(channel)
    pid = small_server.lane_pid()
    os.kill(pid, signal.SIGSTOP)
    held = stub.Predict.future(predict("vanilla", [random_steps(2)]), timeout=TIMEOUT_S)
    eventually(lambda: metric(small_server.metrics_url, "rnnserve_queued_sequences") == 1)
    with undisturbed(channel, repository, "vanilla"):
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as ended:
            held.result()
    assert_refused(refusal_of(ended.value), Code.UNAVAILABLE, "LANE_LOST", None)
    assert refusal_of(ended.value).retry_after_s
    (prediction,) = stub.Predict(predict("stacked", [GOOD["stacked"]]), timeout=TIMEOUT_S).predictions
    assert_close(array(prediction.outputs), whole(repository, "stacked")[:3])
