"""What the client makes of predictions on the wire."""

import numpy as np
import pytest

from rnnserve.answered_rows import rows_from
from rnnserve.results import Prediction, TopLabel, answers_from, joined, prediction_from
from rnnserve.tensors import sequence_tensor
from rnnserve.v1 import prediction_pb2 as pb
from rnnserve.v1.real_time_service_pb2 import StepsAnswer

HEARD = pb.Hypothesis(
    labels=["HH", "AH0"], score=-0.25, attention=sequence_tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
)
SILENT = pb.Hypothesis(score=-1.5)


def encoder_decoders() -> Prediction:
    return prediction_from(pb.Prediction(labels=HEARD.labels, hypotheses=[HEARD, SILENT]))


def aligned(*values: float) -> Prediction:
    return prediction_from(
        pb.Prediction(outputs=sequence_tensor([[value] for value in values]), labels="ab"[: len(values)])
    )


def test_an_encoder_decoders_hypotheses_keep_their_order() -> None:
    best, other = encoder_decoders().hypotheses
    assert (best.labels, best.score) == (("HH", "AH0"), -0.25)
    assert (other.labels, other.score) == ((), -1.5)


def test_attention_is_there_only_where_it_was_asked_for() -> None:
    best, other = encoder_decoders().hypotheses
    np.testing.assert_array_equal(best.attention, [[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    assert other.attention is None


def test_the_attention_of_a_hypothesis_without_labels_is_empty_and_knows_the_steps() -> None:
    silent = pb.Hypothesis(attention=sequence_tensor(np.zeros((0, 3))))
    (hypothesis,) = prediction_from(pb.Prediction(hypotheses=[silent])).hypotheses
    assert hypothesis.attention is not None
    assert hypothesis.attention.shape == (0, 3)


def test_an_encoder_decoder_says_nothing_about_single_steps() -> None:
    prediction = encoder_decoders()
    assert prediction.labels == ("HH", "AH0")
    assert (prediction.outputs.shape, prediction.probabilities, prediction.top) == ((0, 0), None, ())
    assert prediction.label is None
    with pytest.raises(IndexError, match="hypotheses"):
        _ = prediction.output


def test_other_models_have_no_hypotheses_and_their_last_step() -> None:
    prediction = aligned(1.0, 2.0)
    assert (prediction.hypotheses, prediction.label, prediction.output.tolist()) == ((), "b", [2.0])


def test_a_prediction_in_parts_has_the_hypotheses_of_all_of_them() -> None:
    parts = [prediction_from(pb.Prediction(hypotheses=[hypothesis])) for hypothesis in (HEARD, SILENT)]
    assert [hypothesis.score for hypothesis in joined(parts).hypotheses] == [-0.25, -1.5]
    assert joined([aligned(1.0), aligned(2.0)]).hypotheses == ()


SURE_OF_THE_SECOND = pb.Prediction(
    outputs=sequence_tensor([[1.0, 1.0], [0.0, 2.0], [1.0, 1.0]]),
    labels=["", "b", ""],
    top=[pb.TopLabels(), pb.TopLabels(labels=["b"], probabilities=[0.875]), pb.TopLabels()],
)


def test_where_the_model_was_not_sure_enough_a_prediction_has_no_label() -> None:
    prediction = prediction_from(SURE_OF_THE_SECOND)
    assert prediction.labels == (None, "b", None)
    assert prediction.label is None
    assert prediction.top == ((), (TopLabel("b", 0.875),), ())
    assert joined([prediction, prediction]).labels == (None, "b", None) * 2


def test_where_the_model_was_not_sure_enough_an_answer_has_no_label() -> None:
    answers = answers_from(StepsAnswer(first_step=4, next_step=7, prediction=SURE_OF_THE_SECOND))
    assert [(answer.step, answer.label) for answer in answers] == [(4, None), (5, "b"), (6, None)]
    assert [answer.top for answer in answers] == [(), (TopLabel("b", 0.875),), ()]


def test_where_the_model_was_not_sure_enough_a_row_has_no_label() -> None:
    answer = rows_from(np.arange(3), np.zeros(3, np.int64), SURE_OF_THE_SECOND).answer("xyz", {})
    assert answer.labels == (None, "b", None)
    assert answer.top == ((), (TopLabel("b", 0.875),), ())
