from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.sequence_service_pb2 import (
    IdentifiedSequence,
    OpenPredictStream,
    PredictStreamRequest,
    PredictStreamResponse,
)
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer
from tests.support.wire import TIMEOUT_S, Refusal, array, predict, random_steps, refusal_of, sequence


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[SequenceServiceStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield SequenceServiceStub(channel)


def opening(model: str, **options: object) -> PredictStreamRequest:
    return PredictStreamRequest(open=OpenPredictStream(model=model, options=OutputOptions(**options)))  # type: ignore[arg-type]


def item(number: int, values: object) -> PredictStreamRequest:
    return PredictStreamRequest(sequence=IdentifiedSequence(id=number, sequence=sequence(values)))  # type: ignore[arg-type]


def ask(stub: SequenceServiceStub, requests: Iterable[PredictStreamRequest]) -> dict[int, PredictStreamResponse]:
    responses = list(stub.PredictStream(iter(requests), timeout=TIMEOUT_S))
    by_id = {response.id: response for response in responses}
    assert len(by_id) == len(responses)
    return by_id


def test_more_sequences_than_may_be_in_flight_are_each_answered_once(
    stub: SequenceServiceStub, repository: Path
) -> None:
    values = {number: random_steps(1 + number % 7, seed=number) for number in range(200)}
    found = ask(stub, [opening("bidirectional"), *(item(number, value) for number, value in values.items())])
    assert found.keys() == values.keys()
    reference = Reference(repository / "bidirectional" / "1")
    for number in range(0, 200, 20):
        assert_close(array(found[number].prediction.outputs), reference.predict(values[number]))


def test_a_bad_sequence_gets_an_error_of_its_own_and_leaves_the_others_alone(stub: SequenceServiceStub) -> None:
    found = ask(
        stub,
        [
            opening("stacked"),
            item(1, random_steps(3)),
            item(2, "text"),
            item(3, np.zeros((2, 5))),
            item(4, [[1, 2, 3]]),
        ],
    )
    assert {number: response.WhichOneof("result") for number, response in found.items()} == {
        1: "prediction",
        2: "error",
        3: "error",
        4: "prediction",
    }
    assert (Refusal(found[2].error).reason, Refusal(found[2].error).field) == (
        "INPUT_KIND_MISMATCH",
        "sequence.sequence.text",
    )
    assert Refusal(found[3].error).reason == "SHAPE_MISMATCH"


def test_bulk_and_unary_answers_are_the_same(stub: SequenceServiceStub) -> None:
    values = [random_steps(4, seed=1), random_steps(9, seed=2)]
    unary = stub.Predict(predict("stacked", values), timeout=TIMEOUT_S).predictions
    bulk = ask(stub, [opening("stacked"), *(item(number, value) for number, value in enumerate(values))])
    for number, prediction in enumerate(unary):
        assert_close(array(bulk[number].prediction.outputs), array(prediction.outputs), 1e-6)


def test_options_hold_for_every_sequence(stub: SequenceServiceStub) -> None:
    found = ask(stub, [opening("vanilla", top_k=3), item(1, random_steps(2)), item(2, random_steps(3))])
    assert [len(response.prediction.top[0].labels) for response in found.values()] == [3, 3]


def test_a_stream_without_sequences_ends_well(stub: SequenceServiceStub) -> None:
    assert ask(stub, [opening("vanilla")]) == {}


@pytest.mark.parametrize(
    ("message", "reason", "field"),
    [(opening("vanilla"), "OPEN_REPEATED", "open"), (PredictStreamRequest(), "FIELD_INVALID", "request")],
)
def test_what_is_no_sequence_is_answered_and_the_stream_goes_on(
    stub: SequenceServiceStub, message: PredictStreamRequest, reason: str, field: str
) -> None:
    found = ask(stub, [opening("vanilla"), message, item(5, random_steps(2))])
    refusal = Refusal(found[0].error)
    assert (refusal.reason, refusal.field) == (reason, field)
    assert found[5].WhichOneof("result") == "prediction"


@pytest.mark.parametrize(
    ("requests", "reason", "field"),
    [
        ([], "OPEN_MISSING", "open"),
        ([item(1, [[1, 2, 3]])], "OPEN_MISSING", "open"),
        ([opening("nobody")], "MODEL_NOT_FOUND", "open.model"),
        ([opening("bidirectional", steps=1)], "FIELD_INVALID", "open.options.steps"),
        ([opening("stacked", top_k=1)], "FIELD_INVALID", "open.options.top_k"),
        ([opening("vanilla", threshold=2)], "FIELD_INVALID", "open.options.threshold"),
    ],
)
def test_a_bad_open_ends_the_call(
    stub: SequenceServiceStub, requests: list[PredictStreamRequest], reason: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as ended:
        list(stub.PredictStream(iter(requests), timeout=TIMEOUT_S))
    refusal = refusal_of(ended.value)
    assert (refusal.reason, refusal.field) == (reason, field)
