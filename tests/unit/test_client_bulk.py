"""Bulk answers come in any order and leave in the order of the inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnserve import Prediction, RnnserveError, ShapeMismatch, Unreachable
from rnnserve.bulk import Bulk
from rnnserve.exchange import CallEnded, InputsEnded, NextInput, Response
from rnnserve.tensors import sequence_tensor
from rnnserve.v1.prediction_pb2 import Prediction as PredictionMessage
from rnnserve.v1.sequence_service_pb2 import PredictStreamResponse
from tests.unit.test_client_session import refusal

GOOD, BAD = [[1.0]], [1.0]


def answer(number: int) -> Response[PredictStreamResponse]:
    outputs = sequence_tensor(np.array([[number]]))
    return Response(PredictStreamResponse(id=number, prediction=PredictionMessage(outputs=outputs)))


def outputs(results: list[Prediction | RnnserveError]) -> list[float]:
    return [float(result.output[0]) for result in results if isinstance(result, Prediction)]


@given(st.permutations(range(8)))
def test_any_order_of_answers_gives_the_order_of_the_inputs(order: list[int]) -> None:
    bulk = Bulk("raise")
    for number in range(8):
        assert [request.sequence.id for request in bulk.handle(NextInput(GOOD)).requests] == [number]
    bulk.handle(InputsEnded())
    given_out: list[Prediction | RnnserveError] = []
    for number in order:
        assert not bulk.done
        given_out += bulk.handle(answer(number)).results
    assert outputs(given_out) == list(range(8))
    assert bulk.done


def test_a_place_is_free_only_when_a_result_has_left() -> None:
    bulk = Bulk("raise")
    bulk.handle(NextInput(GOOD))
    bulk.handle(NextInput(GOOD))
    assert bulk.handle(answer(1)).places == 0
    assert bulk.handle(answer(0)).places == 2


def test_a_refusal_is_raised_when_its_turn_comes_and_knows_its_index() -> None:
    bulk = Bulk("raise")
    bulk.handle(NextInput(GOOD))
    bulk.handle(NextInput(GOOD))
    bulk.handle(Response(PredictStreamResponse(id=1, error=refusal("NOT_FINITE"))))
    assert not bulk.done
    assert outputs(list(bulk.handle(answer(0)).results)) == [0.0]
    assert bulk.done
    assert isinstance(bulk.failure, RnnserveError)
    assert (bulk.failure.reason, bulk.failure.index) == ("NOT_FINITE", 1)


def test_a_refusal_takes_the_place_of_its_answer_where_errors_are_returned() -> None:
    bulk = Bulk("return")
    for _ in range(3):
        bulk.handle(NextInput(GOOD))
    bulk.handle(InputsEnded())
    bulk.handle(answer(0))
    (error,) = bulk.handle(Response(PredictStreamResponse(id=1, error=refusal("NOT_FINITE")))).results
    assert isinstance(error, RnnserveError)
    assert error.index == 1
    assert outputs(list(bulk.handle(answer(2)).results)) == [2.0]
    assert bulk.done
    assert bulk.failure is None


def test_an_input_that_cannot_be_converted_is_refused_in_its_turn_and_not_sent() -> None:
    bulk = Bulk("return")
    bulk.handle(NextInput(GOOD))
    turn = bulk.handle(NextInput(BAD))
    assert (list(turn.requests), list(turn.results)) == ([], [])
    first, second = bulk.handle(answer(0)).results
    assert isinstance(first, Prediction)
    assert isinstance(second, ShapeMismatch)


def test_the_callers_own_error_comes_after_the_answers_to_what_was_sent() -> None:
    bulk = Bulk("return")
    bulk.handle(NextInput(GOOD))
    bulk.handle(InputsEnded(KeyError("file")))
    assert not bulk.done
    bulk.handle(answer(0))
    assert bulk.done
    assert isinstance(bulk.failure, KeyError)


def test_no_inputs_are_no_results() -> None:
    bulk = Bulk("raise")
    bulk.handle(InputsEnded())
    assert bulk.done


def test_another_way_to_handle_errors_does_not_exist() -> None:
    with pytest.raises(ValueError, match="errors"):
        Bulk("ignore")  # type: ignore[arg-type]


def test_the_end_of_the_call_is_raised_and_nothing_is_resumed() -> None:
    bulk = Bulk("return")
    bulk.handle(NextInput([[1.0]]))
    turn = bulk.handle(CallEnded(Unreachable("gone")))
    assert turn.reconnect_after_s is None
    assert bulk.done
    assert isinstance(bulk.failure, Unreachable)
