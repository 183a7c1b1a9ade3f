"""The bookkeeping of a stream, without a server."""

from collections.abc import Callable

import numpy as np
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from rnnserve import Answer, FieldInvalid, NotFinite, Notice, RnnserveError, ShapeMismatch, StepOutOfOrder
from rnnserve.bookkeepers import StepsAhead
from rnnserve.exchange import InputsEnded, NextInput, Response
from rnnserve.session import Session
from rnnserve.tensors import sequence_tensor
from rnnserve.v1 import prediction_pb2
from rnnserve.v1 import real_time_service_pb2 as pb

STEP = [1.0, 2.0]


def opened(on_notice: Callable[[Notice], object] | None = None) -> Session:
    session = Session("vanilla", 0, None, prediction_pb2.OutputOptions(), on_notice=on_notice)
    session.open()
    session.receive(pb.StreamStepsResponse(opened=pb.SessionOpened(model="vanilla", version=1)))
    return session


def refusal(reason: str, **metadata: str) -> Status:
    detail = Any()
    detail.Pack(ErrorInfo(reason=reason, domain="rnnserve", metadata=metadata))
    return Status(code=3, message=reason, details=[detail])


def refused(reason: str) -> pb.StreamStepsResponse:
    return pb.StreamStepsResponse(error=refusal(reason))


def answered(first_step: int, steps: int = 1, failure: Status | None = None) -> pb.StreamStepsResponse:
    outputs = sequence_tensor(np.arange(first_step, first_step + steps).reshape(steps, 1))
    answer = pb.StepsAnswer(
        first_step=first_step,
        prediction=prediction_pb2.Prediction(outputs=outputs, labels=["x"] * steps),
        next_step=first_step + steps,
        failure=failure,
    )
    return pb.StreamStepsResponse(answer=answer)


def numbers(answers: list[Answer]) -> list[int]:
    return [answer.step for answer in answers]


def test_steps_are_counted_over_messages_of_any_length_and_over_resets() -> None:
    session = opened()
    assert session.steps(STEP).steps.first_step == 0
    assert session.steps([STEP] * 3).steps.first_step == 1
    assert session.reset().reset.first_step == 4
    assert session.steps("abc").steps.first_step == 4
    assert session.steps("d").steps.first_step == 7


def test_the_first_index_is_on_the_wire_even_if_it_is_0() -> None:
    session = opened()
    assert session.reset().reset.HasField("first_step")
    assert session.steps(STEP).steps.HasField("first_step")


def test_an_answer_about_several_steps_is_an_answer_about_each() -> None:
    session = opened()
    session.steps([STEP] * 3)
    answers = session.receive(answered(0, 3))
    assert [(answer.step, answer.label, answer.output.tolist()) for answer in answers] == [
        (0, "x", [0.0]),
        (1, "x", [1.0]),
        (2, "x", [2.0]),
    ]


def test_a_refused_step_can_be_sent_again_with_the_same_index() -> None:
    session = opened()
    session.steps(STEP)
    session.receive(refused("NOT_FINITE"))
    assert isinstance(session.take_refusal(), NotFinite)
    assert session.steps(STEP).steps.first_step == 0


def test_of_a_row_of_refusals_the_first_one_counts() -> None:
    session = opened()
    for _ in range(3):
        session.steps(STEP)
    session.receive(answered(0))
    session.receive(refused("NOT_FINITE"))
    session.receive(refused("STEP_OUT_OF_ORDER"))
    assert isinstance(session.take_refusal(), NotFinite)
    assert session.take_refusal() is None
    assert session.next_step == 1


def test_after_a_failure_inside_a_message_the_next_step_is_the_one_that_failed() -> None:
    session = opened()
    session.steps([STEP] * 5)
    assert numbers(session.receive(answered(0, 2, failure=refusal("EXECUTION_FAILED")))) == [0, 1]
    assert session.next_step == 2
    error = session.take_refusal()
    assert error is not None
    assert error.reason == "EXECUTION_FAILED"


def test_a_step_that_cannot_be_converted_is_not_counted() -> None:
    session = opened()
    with pytest.raises(ShapeMismatch):
        session.steps([[STEP]])
    assert (session.next_step, session.outstanding) == (0, 0)


def draining() -> pb.StreamStepsResponse:
    notice = pb.Notice(reason=pb.NOTICE_REASON_DRAINING, message="going")
    notice.time_left.FromMilliseconds(2500)
    return pb.StreamStepsResponse(notice=notice)


def test_a_notice_is_told_at_once_and_kept_and_answers_nothing() -> None:
    told: list[Notice] = []
    session = opened(told.append)
    session.steps(STEP)
    assert session.receive(draining()) == []
    assert session.outstanding == 1
    assert told == session.notices == [Notice("draining", "going", 2.5)]


def test_a_callback_that_fails_is_logged_and_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(notice: Notice) -> None:
        raise KeyError(notice.reason)

    session = opened(fail)
    session.steps(STEP)
    session.receive(draining())
    assert numbers(session.receive(answered(0))) == [0]
    assert len(session.notices) == 1
    (record,) = caplog.records
    assert (record.name, record.exc_info and record.exc_info[0]) == ("rnnserve.notices", KeyError)


def test_a_random_session_id_differs_each_time_and_travels_as_metadata() -> None:
    first, second = opened(), opened()
    assert first.id != second.id
    assert first.metadata == (("rnnserve-session-id", first.id),)


@pytest.mark.parametrize("session_id", ["", "a b", "a\n", "ä", "x" * 129])
def test_a_session_id_that_would_break_the_metadata_is_refused_at_once(session_id: str) -> None:
    with pytest.raises(FieldInvalid) as caught:
        Session("vanilla", 0, session_id, prediction_pb2.OutputOptions())
    assert caught.value.field == "open.session_id"


@pytest.mark.parametrize("version", [-1, 2**32])
def test_a_version_that_the_wire_has_no_place_for_is_refused_at_once(version: int) -> None:
    with pytest.raises(FieldInvalid, match="a version is a number from 0 to 4294967295, unlike") as caught:
        Session("vanilla", version, None, prediction_pb2.OutputOptions())
    assert caught.value.field == "version"


def test_ahead_each_input_is_sent_and_each_response_frees_a_place() -> None:
    ahead = StepsAhead(opened())
    assert [request.steps.first_step for request in ahead.handle(NextInput([STEP, STEP])).requests] == [0]
    assert [request.steps.first_step for request in ahead.handle(NextInput(STEP)).requests] == [2]
    turn = ahead.handle(Response(answered(0, 2)))
    assert (numbers(list(turn.results)), turn.places, ahead.waiting) == ([0, 1], 1, True)
    ahead.handle(InputsEnded())
    assert not ahead.done
    ahead.handle(Response(answered(2)))
    assert ahead.done
    assert ahead.failure is None


def test_ahead_a_notice_frees_no_place() -> None:
    ahead = StepsAhead(opened())
    ahead.handle(NextInput(STEP))
    assert ahead.handle(Response(pb.StreamStepsResponse(notice=pb.Notice()))).places == 0


def test_ahead_nothing_is_sent_behind_a_known_refusal_and_the_end_waits_for_what_was() -> None:
    session = opened()
    ahead = StepsAhead(session)
    ahead.handle(NextInput(STEP))
    ahead.handle(NextInput(STEP))
    ahead.handle(Response(refused("NOT_FINITE")))
    assert not ahead.handle(NextInput(STEP)).requests
    assert not ahead.done
    ahead.handle(Response(refused("STEP_OUT_OF_ORDER")))
    assert ahead.done
    assert isinstance(ahead.failure, NotFinite)
    assert session.next_step == 0


def test_ahead_the_callers_own_error_comes_after_the_answers_to_what_was_sent() -> None:
    ahead = StepsAhead(opened())
    ahead.handle(NextInput(STEP))
    ahead.handle(InputsEnded(KeyError("sensor")))
    assert not ahead.done
    assert numbers(list(ahead.handle(Response(answered(0))).results)) == [0]
    assert ahead.done
    assert isinstance(ahead.failure, KeyError)


def test_ahead_a_refusal_comes_before_an_error_further_on() -> None:
    ahead = StepsAhead(opened())
    ahead.handle(NextInput(STEP))
    ahead.handle(NextInput([[STEP]]))
    ahead.handle(Response(refused("STEP_OUT_OF_ORDER")))
    assert isinstance(ahead.failure, StepOutOfOrder)


def test_an_answer_without_outputs_is_an_error_and_no_crash() -> None:
    with pytest.raises(RnnserveError):
        opened().last([])
