from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from rnnserve.v1.prediction_pb2 import STEP_SELECTION_ALL, STEP_SELECTION_LAST
from tests.support.bundles import LABELS
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer
from tests.support.wire import (
    array,
    close,
    eventually,
    live_stream,
    metric,
    open_,
    random_steps,
    refusal_of,
    reset,
    steps,
)

NAN = float("nan")


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def test_a_session_is_opened_stepped_and_closed(channel: grpc.Channel) -> None:
    with live_stream(channel) as stream:
        opened = stream.ask(open_("vanilla", "whole-life")).opened
        assert (opened.model, opened.version, opened.next_step) == ("vanilla", 2, 0)
        assert (opened.max_steps_per_message, opened.max_message_bytes) == (1_024, 4 * 2**20)
        answer = stream.ask(steps(0, random_steps(3))).answer
        assert (answer.first_step, answer.next_step) == (0, 3)
        assert array(answer.prediction.outputs).shape == (3, 4)
        assert len(answer.prediction.labels) == 3
        assert set(answer.prediction.labels) <= set(LABELS)
        assert stream.ask(close()).closed.next_step == 3
        assert stream.rest() == []
        assert stream.call.code() == grpc.StatusCode.OK


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 4, 2]])
def test_every_chunking_gives_the_outputs_of_the_whole_sequence(
    channel: grpc.Channel, repository: Path, cuts: list[int]
) -> None:
    values = random_steps(12)
    with live_stream(channel, open_("stacked", "cuts")) as stream:
        pieces = np.split(values, np.cumsum(cuts)[:-1])
        outputs = np.concatenate([stream.step(piece) for piece in pieces])
    assert_close(outputs, Reference(repository / "stacked" / "1").predict(values))


def test_a_text_model_reads_characters(channel: grpc.Channel, repository: Path) -> None:
    with live_stream(channel, open_("text", "typist")) as stream:
        outputs = np.concatenate([stream.step("a"), stream.step("b c"), stream.step("a")])
    assert_close(outputs, Reference(repository / "text" / "1").predict("ab ca"))


def test_an_older_version_is_served_beside_the_newest(channel: grpc.Channel, repository: Path) -> None:
    values = random_steps(4)
    for version in (1, 2):
        with live_stream(channel, open_("vanilla", f"v{version}", version=version)) as stream:
            assert_close(stream.step(values), Reference(repository / "vanilla" / str(version)).predict(values))


def test_a_reset_gives_the_initial_state_and_counting_goes_on(channel: grpc.Channel) -> None:
    values = random_steps(3)
    with live_stream(channel, open_("vanilla", "reset")) as stream:
        first = stream.step(values)
        assert stream.ask(reset(3)).reset.next_step == 3
        np.testing.assert_array_equal(stream.step(values), first)
        assert stream.next_step == 6


def test_a_missing_value_is_held_over_messages_where_the_model_holds(channel: grpc.Channel, repository: Path) -> None:
    values = np.array([[1, NAN, 3], [NAN, 5, NAN], [NAN, NAN, NAN]], np.float32)
    with live_stream(channel, open_("stacked", "holes")) as stream:
        outputs = np.concatenate([stream.step(row[np.newaxis]) for row in values])
    assert_close(outputs, Reference(repository / "stacked" / "1").predict(values))


def test_a_reset_forgets_held_values_too(channel: grpc.Channel) -> None:
    gap = np.full((1, 3), NAN, np.float32)
    with live_stream(channel, open_("stacked", "forget")) as stream:
        fresh = stream.step(gap)
        stream.step(random_steps(2))
        stream.ask(reset(3))
        np.testing.assert_array_equal(stream.step(gap), fresh)


def test_answers_carry_what_the_options_ask_for(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("vanilla", "options", top_k=2, probabilities=True)) as stream:
        prediction = stream.ask(steps(0, random_steps(3))).answer.prediction
    outputs = array(prediction.outputs)
    powers = np.exp(outputs)
    np.testing.assert_allclose(array(prediction.probabilities), powers / powers.sum(axis=1, keepdims=True), rtol=1e-4)
    for label, top in zip(prediction.labels, prediction.top, strict=True):
        assert len(top.labels) == 2
        assert top.labels[0] == label
        assert top.probabilities[0] >= top.probabilities[1]


def test_only_the_last_step_is_answered_where_that_is_asked(channel: grpc.Channel) -> None:
    values = random_steps(5)
    with live_stream(channel, open_("vanilla", "all", steps=STEP_SELECTION_ALL)) as stream:
        whole = stream.step(values)
    with live_stream(channel, open_("vanilla", "last", steps=STEP_SELECTION_LAST)) as stream:
        answer = stream.ask(steps(0, values)).answer
    assert (answer.first_step, answer.next_step) == (4, 5)
    np.testing.assert_allclose(array(answer.prediction.outputs), whole[-1:], rtol=1e-6)


def test_steps_sent_ahead_are_answered_in_order(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("vanilla", "ahead")) as stream:
        stream.send(*(steps(i, random_steps(1, seed=i)) for i in range(50)), close())
        responses = stream.rest()
    assert [response.answer.first_step for response in responses[:-1]] == list(range(50))
    assert responses[-1].closed.next_step == 50


def test_a_stream_that_ends_without_close_ends_its_session(server: RunningServer, channel: grpc.Channel) -> None:
    with live_stream(channel, open_("vanilla", "half")) as stream:
        stream.step(random_steps(1))
        stream.half_close()
        assert stream.rest() == []
        assert stream.call.code() == grpc.StatusCode.OK
    with live_stream(channel, open_("vanilla", "half")) as again:
        assert len(again.step(random_steps(1))) == 1


@pytest.mark.parametrize("model", ["vanilla", "stacked", "text"])
def test_sessions_are_counted_while_they_are_open(server: RunningServer, channel: grpc.Channel, model: str) -> None:
    labels = {"model": model, "version": "2" if model == "vanilla" else "1"}
    eventually(lambda: metric(server.metrics_url, "rnnserve_sessions", **labels) == 0)
    with live_stream(channel, open_(model, "counted")) as stream:
        assert metric(server.metrics_url, "rnnserve_sessions", **labels) == 1
        stream.ask(close())
        stream.rest()
    assert metric(server.metrics_url, "rnnserve_sessions", **labels) == 0


def test_a_bidirectional_model_is_refused_with_the_reason(channel: grpc.Channel) -> None:
    with live_stream(channel) as stream:
        stream.send(open_("bidirectional", "never"))
        with pytest.raises(grpc.RpcError) as ended:
            stream.read()
    refusal = refusal_of(ended.value)
    assert (ended.value.code(), refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_STREAMABLE")
    assert "reads the sequence from both ends" in refusal.message
    assert "SequenceService" in refusal.message
    assert refusal.violation.violations[0].subject == "bidirectional"
