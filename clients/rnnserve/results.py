"""What calls return."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rnnserve.errors import RnnserveError
from rnnserve.tensors import Array, array_from
from rnnserve.v1 import prediction_pb2, real_time_service_pb2


class TopLabel(NamedTuple):
    """One of the most probable labels."""

    label: str
    probability: float


class ResumePoint(NamedTuple):
    """Where a stream stands: whoever has it can go on with the session. The token is a secret."""

    session: str
    """The session id."""
    token: str
    """32 hex digits."""
    answered_step: int
    """The index before which every answer was received."""
    reset: bool = False
    """Whether the session was reset before the step of that index, so that whoever goes on does it again."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says about one step of a stream.

    One that `step` returns where a look-ahead keeps all answers to come is about no step: its step is -1, its output
    has the shape (0,), its label is None.
    """

    step: int
    """The index of the step that it is about, counted from 0 over the whole session."""
    output: Array
    """(outputs,) float32: before any softmax."""
    label: str | None
    """The most probable label; None where it is below the threshold, and for a model without labels."""
    probabilities: Array | None
    """(labels,) float32 in the order of `Model.labels`; None unless asked for."""
    top: tuple[TopLabel, ...]
    """The most probable labels, the most probable one first, without those below the threshold; empty unless asked
    for."""


NO_ANSWER = Answer(step=-1, output=np.zeros(0, np.float32), label=None, probabilities=None, top=())


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """One output of an encoder-decoder."""

    labels: tuple[str, ...]
    """Without the one that means the end; may be empty."""
    score: float
    """The log probability, divided by the length as `Decoding.length_penalty` has it; the highest is the best."""
    attention: Array | None
    """(labels, steps) float32: how much each label attends to each step of the input, rows summing to 1; None unless
    asked for."""
    is_cut: bool = False
    """Whether it has as many labels as it may have, and no end."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says about a whole sequence: about each of its steps, or about the last one only.

    An encoder-decoder's is in its `hypotheses`: it says nothing about single steps.
    """

    outputs: Array
    """(steps, outputs) float32: before any softmax. One row where only the last step was asked for. (0, 0) for an
    encoder-decoder."""
    labels: tuple[str | None, ...]
    """The most probable label about each of these steps, None where it is below the threshold; empty for a model
    without labels. Of an encoder-decoder: the labels of its best hypothesis."""
    probabilities: Array | None
    """(steps, labels) float32 in the order of `Model.labels`; None unless asked for."""
    top: tuple[tuple[TopLabel, ...], ...]
    """The most probable labels about each of these steps, without those below the threshold; empty unless asked for."""
    hypotheses: tuple[Hypothesis, ...] = ()
    """The best first; empty for models that are no encoder-decoders."""

    @property
    def output(self) -> Array:
        """(outputs,): about the last step. Raises IndexError for an encoder-decoder, which has none."""
        if self.hypotheses:
            raise IndexError("an encoder-decoder has no output about a step: see hypotheses")
        last: Array = self.outputs[-1]
        return last

    @property
    def label(self) -> str | None:
        """The most probable label about the last step; None where it is below the threshold, for a model without labels
        and for an encoder-decoder."""
        return self.labels[-1] if self.labels and not self.hypotheses else None


@dataclass(frozen=True, eq=False)
class BatchAnswer:
    """What a model says about steps of many sessions, a row for each of them.

    A session in `errors` has a row without an answer: its outputs are NaN, its label is None and its step is -1. So has
    one whose step brings none yet, because the model has a look-ahead.
    """

    sessions: tuple[str, ...]
    """Whose steps these are."""
    steps: npt.NDArray[np.int64]
    """(rows,): the index of each one's step, counted from 0 over the whole session."""
    outputs: Array
    """(rows, outputs) float32: before any softmax. (rows, 0) where there never was an answer."""
    labels: tuple[str | None, ...]
    """The most probable label of each row; None where it is below the threshold, and for a model without labels."""
    probabilities: Array | None
    """(rows, labels) float32 in the order of `Model.labels`; None unless asked for."""
    top: tuple[tuple[TopLabel, ...], ...]
    """The most probable labels of each row, the most probable one first, without those below the threshold; empty
    unless asked for."""
    errors: dict[str, RnnserveError]
    """Of the sessions whose step was refused or that have ended: why."""


@dataclass(frozen=True)
class Notice:
    """Something about a stream that nobody asked for."""

    reason: str
    """What the server says: "draining" = it is shutting down; "evicted" = the session met one of its limits. What the
    stream itself says: "interrupted" = it has lost its server and tries to resume; "resumed" = it goes on;
    "not_erased" = it is closed, but the server's store may still have its session."""
    message: str
    """The same as a sentence."""
    time_left_s: float = 0.0
    """How long a draining server still waits before it ends the stream."""
    error: RnnserveError | None = None
    """What interrupted the stream."""
    step: int | None = None
    """The step with which a resumed stream goes on: the first one that the server has not applied."""
    session: str | None = None
    """Of a multiplexed call: which session it is about; None = all of them."""


def prediction_from(message: prediction_pb2.Prediction) -> Prediction:
    """A message of the wire -> what the caller gets."""
    return Prediction(
        outputs=array_from(message.outputs),
        labels=tuple([label or None for label in message.labels]),
        probabilities=array_from(message.probabilities) if message.HasField("probabilities") else None,
        top=tuple(top_from(top) for top in message.top),
        hypotheses=tuple(_hypothesis_from(hypothesis) for hypothesis in message.hypotheses),
    )


def joined(parts: Sequence[Prediction]) -> Prediction:
    """One prediction that came in parts, at least one."""
    if len(parts) == 1:
        return parts[0]
    probabilities = [part.probabilities for part in parts if part.probabilities is not None]
    return Prediction(
        outputs=np.concatenate([part.outputs for part in parts]),
        labels=tuple(label for part in parts for label in part.labels),
        probabilities=np.concatenate(probabilities) if probabilities else None,
        top=tuple(top for part in parts for top in part.top),
        hypotheses=tuple(hypothesis for part in parts for hypothesis in part.hypotheses),
    )


def answers_from(message: real_time_service_pb2.StepsAnswer) -> list[Answer]:
    """One answer for each step that the message is about, in order."""
    prediction = prediction_from(message.prediction)
    return [
        Answer(
            step=message.first_step + row,
            output=output,
            label=prediction.labels[row] if prediction.labels else None,
            probabilities=None if prediction.probabilities is None else prediction.probabilities[row],
            top=prediction.top[row] if prediction.top else (),
        )
        for row, output in enumerate(prediction.outputs)
    ]


def notice_from(message: real_time_service_pb2.Notice) -> Notice:
    """A message of the wire -> what the caller gets."""
    name = real_time_service_pb2.NoticeReason.Name(message.reason)
    reason = name.removeprefix("NOTICE_REASON_").lower()
    return Notice(reason, message.message, message.time_left.ToTimedelta().total_seconds())


def _hypothesis_from(hypothesis: prediction_pb2.Hypothesis) -> Hypothesis:
    return Hypothesis(
        labels=tuple(hypothesis.labels),
        score=hypothesis.score,
        attention=array_from(hypothesis.attention) if hypothesis.HasField("attention") else None,
        is_cut=hypothesis.is_cut,
    )


def top_from(top: prediction_pb2.TopLabels) -> tuple[TopLabel, ...]:
    """A message of the wire -> what the caller gets."""
    return tuple(TopLabel(*pair) for pair in zip(top.labels, top.probabilities, strict=True))
