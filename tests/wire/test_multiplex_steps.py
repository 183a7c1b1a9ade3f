import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.real_time_service_pb2 import NOTICE_REASON_DRAINING, StepBatch, TextSteps
from rnnserve.v1.session_service_pb2 import DeleteSessionRequest
from rnnserve.v1.session_service_pb2_grpc import SessionServiceStub
from tests.support.bundles import LABELS, accumulated
from tests.support.multiplexed import (
    MultiplexedCall,
    Request,
    close_handle,
    multiplexed,
    open_handle,
    reset_handle,
    step_each,
)
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer, start_server
from tests.support.wire import (
    Floats,
    Refusal,
    array,
    live_stream,
    metric,
    open_,
    random_steps,
    refusal_of,
    resume,
    tensor,
)

NAN = float("nan")


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture
def call(channel: grpc.Channel) -> Iterator[MultiplexedCall]:
    with multiplexed(channel) as call:
        yield call


def recordings(sessions: int, count: int) -> Floats:
    """(sessions, steps, features), each its own."""
    return np.stack([random_steps(count, seed) for seed in range(sessions)])


def test_each_session_of_a_stream_gives_the_outputs_of_its_whole_sequence(
    call: MultiplexedCall, repository: Path
) -> None:
    values = recordings(5, 12)
    for handle in range(5):
        opened = call.open(handle, "stacked", f"handle-each-{handle}")
        assert (opened.opened.model, opened.opened.next_step, opened.max_outstanding_steps) == ("stacked", 0, 32)
    rows = [call.step(dict.fromkeys(range(5), step), values[:, step]) for step in range(12)]
    for handle in range(5):
        reference = Reference(repository / "stacked" / "1").predict(values[handle])
        assert_close(np.stack([row[handle] for row in rows]), reference)


def test_sessions_of_a_batch_may_be_at_different_steps(call: MultiplexedCall, repository: Path) -> None:
    values = recordings(2, 3)
    call.open(0, "vanilla", "handle-ahead")
    call.open(1, "vanilla", "handle-behind")
    call.step({0: 0}, values[0, :1])
    call.step({1: 0, 0: 1}, [values[1, 0], values[0, 1]])
    outputs = call.step({0: 2, 1: 1}, [values[0, 2], values[1, 1]])
    reference = Reference(repository / "vanilla" / "2")
    assert_close(outputs[0], reference.predict(values[0])[2])
    assert_close(outputs[1], reference.predict(values[1])[1])


def test_steps_sent_ahead_of_their_answers_are_applied_in_order(call: MultiplexedCall, repository: Path) -> None:
    values = recordings(3, 20)
    for handle in range(3):
        call.open(handle, "vanilla", f"handle-ahead-{handle}")
    call.send(*(step_each(dict.fromkeys(range(3), step), values[:, step]) for step in range(20)))
    answers = call.answers(60)
    for handle in range(3):
        outputs = np.stack([answers[handle, step] for step in range(20)])
        assert_close(outputs, Reference(repository / "vanilla" / "2").predict(values[handle]))


def test_a_text_model_reads_a_character_of_each(call: MultiplexedCall, repository: Path) -> None:
    call.open(0, "text", "handle-a-text")
    call.open(1, "text", "handle-b-text")
    outputs = call.step({0: 0, 1: 0}, "ab")
    assert_close(outputs[0], Reference(repository / "text" / "1").predict("a")[0])
    assert_close(outputs[1], Reference(repository / "text" / "1").predict("b")[0])


def test_answers_carry_what_each_session_asked_for(call: MultiplexedCall) -> None:
    call.open(0, "vanilla", "handle-plain")
    call.open(1, "vanilla", "handle-with-more", options=OutputOptions(probabilities=True, top_k=2))
    call.open(2, "vanilla", "handle-unsure", options=OutputOptions(threshold=1))
    call.send(step_each({0: 0, 1: 0, 2: 0}, random_steps(3)))
    found = {}
    for response in (call.read(), call.read(), call.read()):
        (handle,) = response.answer.handles
        found[handle] = response.answer.prediction
    assert not found[0].HasField("probabilities")
    assert array(found[1].probabilities).shape == (1, 4)
    assert len(found[1].top[0].labels) == 2
    assert set(found[0].labels) | set(found[1].labels) <= set(LABELS)
    assert list(found[2].labels) == [""]


TOKEN = b"0123456789abcdef"
VALUES = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
SUMS = accumulated(VALUES)
BAD = {
    "a value that is not finite": ([NAN], {1: 0}, ("NOT_FINITE", "steps.tensor.data")),
    "a step behind a gap": ([2.0], {1: 7}, ("STEP_OUT_OF_ORDER", "steps.first_step")),
    "a handle without a session": ([2.0], {9: 0}, ("SESSION_NOT_FOUND", "steps.handles")),
}


def accumulate(call: MultiplexedCall, index: int, *handles: int) -> None:
    """Step each handle through the value of that index; the answers must be the right sums."""
    outputs = call.step(dict.fromkeys(handles, index), [[VALUES[index]]] * len(handles))
    assert {handle: tuple(output) for handle, output in outputs.items()} == dict.fromkeys(handles, SUMS[index])


@pytest.mark.parametrize("case", BAD)
def test_a_bad_step_of_one_session_is_refused_alone(call: MultiplexedCall, case: str) -> None:
    value, bad, why = BAD[case]
    call.open(0, "accumulator", f"handle-good of {len(case)}".replace(" ", "-"))
    call.open(1, "accumulator", f"handle-bad of {len(case)}".replace(" ", "-"))
    call.send(step_each({0: 0, **bad}, [[VALUES[0]], value]))
    responses = {response.WhichOneof("response"): response for response in (call.read(), call.read())}
    assert [tuple(row) for row in array(responses["answer"].answer.prediction.outputs)] == [SUMS[0]]
    refused = responses["refused"].refused
    assert dict(zip(refused.handles, refused.first_steps, strict=True)) == bad
    refusal = Refusal(refused.error)
    assert (refusal.reason, refusal.field) == why
    accumulate(call, 1, 0)
    accumulate(call, 0, 1)


@pytest.mark.parametrize(
    ("batch", "reason", "field"),
    [
        (StepBatch(), "STEPS_MISSING", "steps.handles"),
        (StepBatch(handles=[0, 0], first_steps=[0, 0]), "FIELD_INVALID", "steps.handles"),
        (StepBatch(handles=[0, 1], first_steps=[0]), "FIELD_INVALID", "steps.first_steps"),
        (StepBatch(handles=[0], first_steps=[0], answered_steps=[0, 0]), "FIELD_INVALID", "steps.answered_steps"),
        (StepBatch(handles=[0, 2], first_steps=[0, 0], tensor=tensor([[1.0]] * 2)), "FIELD_INVALID", "steps.handles"),
        (StepBatch(handles=range(2_000), first_steps=[0] * 2_000), "TOO_MANY_STEPS", "steps.handles"),
        (StepBatch(handles=[0, 1], first_steps=[0, 0]), "STEPS_MISSING", "steps.input"),
        (
            StepBatch(handles=[0, 1], first_steps=[0, 0], text=TextSteps(steps=["a", "b"])),
            "INPUT_KIND_MISMATCH",
            "steps.text",
        ),
        (StepBatch(handles=[0], first_steps=[0], tensor=tensor([[1.0]] * 2)), "SHAPE_MISMATCH", "steps.tensor.shape"),
        (StepBatch(handles=[0], first_steps=[0], tensor=tensor([[1.0, 2.0]])), "SHAPE_MISMATCH", "steps.tensor.shape"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused_whole_and_changes_nothing(
    channel: grpc.Channel, batch: StepBatch, reason: str, field: str
) -> None:
    with multiplexed(channel) as call:
        for handle, model in enumerate(("accumulator", "accumulator", "vanilla")):
            call.open(handle, model, secrets.token_hex(8))
        call.send(Request(steps=batch))
        steps, refusal = call.refused()
        assert (refusal.reason, refusal.field) == (reason, field)
        assert set(steps) == set(batch.handles)
        accumulate(call, 0, 0, 1)


def test_a_handle_is_never_used_again(call: MultiplexedCall) -> None:
    call.open(5, "accumulator", "handle-five")
    for handle in (5, 4):
        call.send(open_handle(handle, "accumulator", "handle-another"))
        steps, refusal = call.refused()
        assert (list(steps), refusal.reason, refusal.field) == ([handle], "FIELD_INVALID", "open.handle")
    accumulate(call, 0, 5)
    assert call.ask(close_handle(5)).closed.handle == 5
    call.send(open_handle(5, "accumulator", "another"))
    assert call.refused()[1].field == "open.handle"


@pytest.mark.parametrize(
    ("opening", "reason", "field"),
    [
        ({"model": "nobody", "session_id": "a"}, "MODEL_NOT_FOUND", "open.open.model"),
        ({"model": "bidirectional", "session_id": "a"}, "MODEL_NOT_STREAMABLE", None),
        ({"model": "accumulator", "session_id": "a b"}, "FIELD_INVALID", "open.open.session_id"),
        ({"model": "accumulator", "session_id": "handle-taken"}, "SESSION_EXISTS", "open.open.session_id"),
    ],
)
def test_an_open_that_is_refused_ends_its_handle_alone(
    channel: grpc.Channel, opening: dict[str, Any], reason: str, field: str | None
) -> None:
    with multiplexed(channel) as call:
        call.open(0, "accumulator", "handle-taken")
        call.send(open_handle(1, **opening))
        handles, refusal = call.ended()
        assert (handles, refusal.reason, refusal.field) == ([1], reason, field)
        accumulate(call, 0, 0)


def test_a_session_whose_stream_was_cut_goes_on_on_another_one(channel: grpc.Channel) -> None:
    with multiplexed(channel) as call:
        for handle in range(3):
            call.open(handle, "accumulator", f"handle-cut-{handle}", token=TOKEN)
        for index in range(4):
            accumulate(call, index, 0, 1, 2)
    with multiplexed(channel) as call:
        for handle, answered in enumerate((4, 2, 0), 7):
            opened = call.open(
                handle, "accumulator", f"handle-cut-{handle - 7}", token=TOKEN, resume=True, answered_step=answered
            )
            assert opened.opened.next_step == 4
            missed = [tuple(row) for answer in opened.missed for row in array(answer.prediction.outputs)]
            assert missed == SUMS[answered:4]
        accumulate(call, 4, 7, 8, 9)
    with live_stream(channel, resume(open_("accumulator", "handle-cut-1", token=TOKEN), answered_step=5)) as stream:
        assert stream.next_step == 5


def test_steps_that_are_sent_again_are_answered_again_and_not_applied(call: MultiplexedCall) -> None:
    call.open(0, "accumulator", "handle-again-0", token=TOKEN)
    call.open(1, "accumulator", "handle-again-1", token=TOKEN)
    for index in range(3):
        accumulate(call, index, 0)
    call.send(step_each({0: 1, 1: 0}, [[VALUES[1]], [VALUES[0]]]))
    answers = {key: tuple(output) for key, output in call.answers(2).items()}
    assert answers == {(0, 1): SUMS[1], (1, 0): SUMS[0]}
    accumulate(call, 3, 0)


def test_a_step_that_was_acknowledged_is_answered_without_a_row(call: MultiplexedCall) -> None:
    call.open(0, "accumulator", "handle-acknowledged", token=TOKEN)
    accumulate(call, 0, 0)
    call.step({0: 1}, [[VALUES[1]]], answered=[1])
    answer = call.ask(step_each({0: 0}, [[VALUES[0]]])).answer
    assert (list(answer.handles), list(answer.first_steps), answer.HasField("prediction")) == ([0], [0], False)
    accumulate(call, 2, 0)


def test_a_reset_begins_with_the_initial_state_and_counting_goes_on(call: MultiplexedCall) -> None:
    call.open(0, "accumulator", "handle-reset")
    accumulate(call, 0, 0)
    call.send(step_each({0: 1}, [[VALUES[1]]]), reset_handle(0, 2), step_each({0: 2}, [[VALUES[0]]]))
    assert [tuple(row) for row in array(call.read().answer.prediction.outputs)] == [SUMS[1]]
    response = call.read()
    assert (response.reset.handle, response.reset.next_step) == (0, 2)
    assert [tuple(row) for row in array(call.read().answer.prediction.outputs)] == [SUMS[0]]
    call.send(reset_handle(0, 9))
    steps, refusal = call.refused()
    assert (steps, refusal.reason, refusal.field) == ({0: 9}, "STEP_OUT_OF_ORDER", "reset.reset.first_step")


def test_close_ends_a_session_behind_what_was_sent_before_it(call: MultiplexedCall, server: RunningServer) -> None:
    call.open(0, "accumulator", "handle-closed", token=TOKEN)
    call.open(1, "accumulator", "handle-stays", token=TOKEN)
    call.send(step_each({0: 0}, [[VALUES[0]]]), close_handle(0, 1, answered_step=1), step_each({0: 1}, [[VALUES[1]]]))
    assert call.read().HasField("answer")
    rest = [call.read(), call.read()]
    (closed,) = [response.closed for response in rest if response.HasField("closed")]
    (refused,) = [response.refused for response in rest if response.HasField("refused")]
    assert (closed.handle, closed.closed.next_step, closed.closed.erased) == (0, 1, True)
    assert Refusal(refused.error).reason == "SESSION_NOT_FOUND"
    accumulate(call, 0, 1)


def test_a_close_at_another_step_is_refused_and_the_session_stays(call: MultiplexedCall) -> None:
    call.open(0, "accumulator", "handle-not-closed")
    call.send(close_handle(0, 3))
    steps, refusal = call.refused()
    assert (steps, refusal.reason, refusal.field) == ({0: 3}, "STEP_OUT_OF_ORDER", "close.close.first_step")
    accumulate(call, 0, 0)


def test_a_session_that_is_taken_over_ends_its_handle_and_its_neighbours_go_on(channel: grpc.Channel) -> None:
    with multiplexed(channel) as call:
        call.open(0, "accumulator", "handle-moved", token=TOKEN)
        call.open(1, "accumulator", "handle-not-moved", token=TOKEN)
        accumulate(call, 0, 0, 1)
        with multiplexed(channel) as other:
            assert other.open(0, "accumulator", "handle-moved", token=TOKEN, resume=True).opened.next_step == 1
            handles, refusal = call.ended()
            assert (handles, refusal.reason) == ([0], "SESSION_MOVED")
            accumulate(other, 1, 0)
        accumulate(call, 1, 1)
        call.send(step_each({0: 1}, [[VALUES[1]]]))
        assert call.refused()[1].reason == "SESSION_NOT_FOUND"


def test_a_session_that_is_deleted_ends_its_handle_alone(channel: grpc.Channel) -> None:
    with multiplexed(channel) as call:
        call.open(0, "accumulator", "handle-deleted", token=TOKEN)
        call.open(1, "accumulator", "handle-not-deleted", token=TOKEN)
        SessionServiceStub(channel).DeleteSession(DeleteSessionRequest(session_id="handle-deleted"), timeout=30)
        handles, refusal = call.ended()
        assert (handles, refusal.reason) == ([0], "SESSION_NOT_FOUND")
        accumulate(call, 0, 1)


def test_idle_sessions_are_parked_and_their_handles_end(repository: Path) -> None:
    with (
        start_server(repository, idle_timeout_s=0.5) as server,
        grpc.insecure_channel(server.target) as channel,
        multiplexed(channel) as call,
    ):
        for handle in range(3):
            call.open(handle, "accumulator", f"handle-idle-{handle}", token=TOKEN)
        accumulate(call, 0, 0, 1, 2)
        ended: list[int] = []
        while len(ended) < 3:
            handles, refusal = call.ended()
            assert (refusal.reason, refusal.metadata["limit"]) == ("EVICTED", "idle_timeout_s")
            ended += handles
        assert sorted(ended) == [0, 1, 2]
        assert call.open(3, "accumulator", "handle-idle-1", token=TOKEN, resume=True).opened.next_step == 1
        accumulate(call, 1, 3)


def test_a_multiplexed_session_counts_as_a_live_one(repository: Path) -> None:
    with (
        start_server(repository, max_streams=2) as server,
        grpc.insecure_channel(server.target) as channel,
        multiplexed(channel) as call,
    ):
        call.open(0, "accumulator", "handle-a")
        call.open(1, "accumulator", "handle-b")
        call.send(open_handle(2, "accumulator", "c"))
        handles, refusal = call.ended()
        assert (handles, refusal.reason, refusal.metadata["limit"]) == ([2], "SESSION_LIMIT", "2")


def test_what_is_durable_is_told_even_if_nothing_else_is(repository: Path, tmp_path: Path) -> None:
    with (
        start_server(repository, tmp_path, checkpoint_interval_s=0.05) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        with multiplexed(channel) as call:
            for handle in range(3):
                call.open(handle, "accumulator", f"handle-durable-{handle}", token=TOKEN)
            accumulate(call, 0, 0, 1, 2)
            accumulate(call, 1, 0)
            call.wait_until_durable({0: 2, 1: 1, 2: 1})
        server.kill()
    with (
        start_server(repository, tmp_path) as server,
        grpc.insecure_channel(server.target) as channel,
        multiplexed(channel) as call,
    ):
        for handle, step in ((0, 2), (1, 1), (2, 1)):
            opened = call.open(handle, "accumulator", f"handle-durable-{handle}", token=TOKEN, resume=True)
            assert opened.opened.next_step == step
        accumulate(call, 1, 1, 2)


def test_a_drain_is_announced_and_ends_the_stream_and_no_session_is_lost(repository: Path, tmp_path: Path) -> None:
    with start_server(repository, tmp_path) as server, grpc.insecure_channel(server.target) as channel:
        with multiplexed(channel) as call:
            call.open(0, "accumulator", "handle-drained", token=TOKEN)
            accumulate(call, 0, 0)
            server.terminate()
            assert call.read().notice.reason == NOTICE_REASON_DRAINING
            call.send(open_handle(1, "accumulator", "late", token=TOKEN))
            handles, refusal = call.ended()
            assert (handles, refusal.reason) == ([1], "DRAINING")
            with pytest.raises(grpc.RpcError) as ended:
                call.read()
            assert refusal_of(ended.value).reason == "DRAINING"
        assert server.process.wait(30) == 0
    with (
        start_server(repository, tmp_path) as server,
        grpc.insecure_channel(server.target) as channel,
        multiplexed(channel) as call,
    ):
        assert call.open(0, "accumulator", "handle-drained", token=TOKEN, resume=True).opened.next_step == 1
        accumulate(call, 1, 0)


def test_what_was_sent_before_the_end_of_the_requests_is_answered(call: MultiplexedCall) -> None:
    call.open(0, "accumulator", "handle-half-closed")
    call.send(*(step_each({0: index}, [[value]]) for index, value in enumerate(VALUES)))
    call.half_close()
    outputs = [tuple(row) for response in call.rest() for row in array(response.answer.prediction.outputs)]
    assert outputs == SUMS
    assert call.call.code() == grpc.StatusCode.OK


def test_steps_ticks_and_refusals_of_multiplexed_sessions_are_counted(repository: Path) -> None:
    model = {"model": "accumulator", "version": "1"}
    with (
        start_server(repository) as server,
        grpc.insecure_channel(server.target) as channel,
        multiplexed(channel) as call,
    ):
        call.open(0, "accumulator", "handle-a")
        call.open(1, "accumulator", "handle-b")
        accumulate(call, 0, 0, 1)
        call.send(step_each({0: 9}, [[1.0]]))
        call.refused()
        page = server.metrics_url
        assert metric(page, "rnnserve_sessions", **model) == 2
        assert metric(page, "rnnserve_steps_total", **model) == 2
        assert metric(page, "rnnserve_tick_sessions_sum", **model) == 2
        assert metric(page, "rnnserve_tick_sessions_count", **model) == 1
        assert metric(page, "rnnserve_step_seconds_count", **model) == 1
        assert metric(page, "rnnserve_refusals_total", reason="STEP_OUT_OF_ORDER") == 1
