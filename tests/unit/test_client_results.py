"""What the client makes of predictions on the wire."""

import numpy as np
import pytest

from rnnserve.results import Prediction, joined, prediction_from
from rnnserve.tensors import sequence_tensor
from rnnserve.v1 import prediction_pb2 as pb

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
