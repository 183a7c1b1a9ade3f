from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rnnserve.v1.prediction_pb2 import STEP_SELECTION_ALL, STEP_SELECTION_LAST
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer
from tests.support.wire import TIMEOUT_S, array, predict, random_steps


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[SequenceServiceStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield SequenceServiceStub(channel)


LENGTHS = (5, 1, 30, 2)
SEQUENCES = [random_steps(length, seed=length) for length in LENGTHS]


def ask(stub: SequenceServiceStub, model: str, sequences: list[Any] = SEQUENCES, **rest: Any) -> list[Any]:
    return list(stub.Predict(predict(model, sequences, **rest), timeout=TIMEOUT_S).predictions)


def test_sequences_of_different_lengths_are_answered_in_their_order(
    stub: SequenceServiceStub, repository: Path
) -> None:
    reference = Reference(repository / "stacked" / "1")
    for values, prediction in zip(SEQUENCES, ask(stub, "stacked"), strict=True):
        assert_close(array(prediction.outputs), reference.predict(values))


def test_a_bidirectional_network_answers_about_the_whole_sequence(stub: SequenceServiceStub, repository: Path) -> None:
    reference = Reference(repository / "bidirectional" / "1")
    for values, prediction in zip(SEQUENCES, ask(stub, "bidirectional"), strict=True):
        assert_close(array(prediction.outputs), reference.predict(values))
        assert prediction.labels[0] in ("yes", "no")


def test_texts_of_different_lengths_are_answered(stub: SequenceServiceStub, repository: Path) -> None:
    texts = ["abc", " ", "a b c a b c"]
    for text, prediction in zip(texts, ask(stub, "text", texts), strict=True):
        assert_close(array(prediction.outputs), Reference(repository / "text" / "1").predict(text))
        assert len(prediction.labels) == len(text)


def test_missing_values_are_held_within_each_sequence(stub: SequenceServiceStub, repository: Path) -> None:
    holes = random_steps(6)
    holes[[0, 2, 3], [1, 0, 0]] = np.nan
    sequences = [holes, random_steps(2), holes[2:]]
    for values, prediction in zip(sequences, ask(stub, "stacked", sequences), strict=True):
        assert_close(array(prediction.outputs), Reference(repository / "stacked" / "1").predict(values))


def test_a_many_to_one_model_answers_about_the_last_step_unless_all_are_asked_for(stub: SequenceServiceStub) -> None:
    whole = [array(prediction.outputs) for prediction in ask(stub, "vanilla", steps=STEP_SELECTION_ALL)]
    assert [len(outputs) for outputs in whole] == list(LENGTHS)
    for prediction, outputs in zip(ask(stub, "vanilla"), whole, strict=True):
        np.testing.assert_allclose(array(prediction.outputs), outputs[-1:], rtol=1e-5, atol=1e-6)
        assert len(prediction.labels) == 1


def test_an_aligned_model_answers_about_the_last_step_if_asked(stub: SequenceServiceStub) -> None:
    last = ask(stub, "stacked", steps=STEP_SELECTION_LAST)
    assert [array(prediction.outputs).shape for prediction in last] == [(1, 2)] * 4


def test_the_answer_names_the_model_and_version_found(stub: SequenceServiceStub) -> None:
    response = stub.Predict(predict("vanilla", SEQUENCES[:1]), timeout=TIMEOUT_S)
    assert (response.model, response.version) == ("vanilla", 2)


def test_options_ask_for_probabilities_and_top_labels(stub: SequenceServiceStub) -> None:
    for prediction in ask(stub, "bidirectional", probabilities=True, top_k=1):
        row = array(prediction.probabilities)
        np.testing.assert_allclose(row.sum(), 1.0, rtol=1e-5)
        assert prediction.top[0].labels[0] == prediction.labels[0]
        assert prediction.top[0].probabilities[0] == row.max()


def test_a_sequence_longer_than_a_streams_message_may_hold_is_answered(stub: SequenceServiceStub) -> None:
    (prediction,) = ask(stub, "stacked", [random_steps(1_500)])
    assert array(prediction.outputs).shape == (1_500, 2)
