"""Steps of many sessions on their way to the wire, and the answers to them."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rnnserve.errors import RnnserveError, ShapeMismatch
from rnnserve.replay import WhenReplayFull, check_replay
from rnnserve.results import Prediction, TopLabel, prediction_from
from rnnserve.tensors import Array, Input, batch_rows, tensor_from
from rnnserve.v1 import prediction_pb2
from rnnserve.v1 import real_time_service_pb2 as pb

if TYPE_CHECKING:
    from rnnserve.multiplexed import Columns

Integers = npt.NDArray[np.int64]
ROW_OVERHEAD_BYTES = 30  # at most, of what goes with a row: its handle and two indices
MESSAGE_OVERHEAD_BYTES = 100


@dataclass(frozen=True, eq=False)
class BatchAnswer:
    """What a model says about a step of each of several sessions, a row for each."""

    sessions: tuple[str, ...]
    steps: Integers
    """(sessions,): the index of each one's step, counted from 0 over the whole session; -1 where there is an error."""
    outputs: Array
    """(sessions, outputs) float32: before any softmax; not a number where there is an error."""
    labels: tuple[str | None, ...]
    """The most probable label of each; None where there is an error, and for a model without labels."""
    probabilities: Array | None
    """(sessions, labels) float32 in the order of `Model.labels`; None unless asked for."""
    top: tuple[tuple[TopLabel, ...], ...]
    """The most probable labels of each; empty unless asked for."""
    errors: Mapping[str, RnnserveError]
    """By session: why its step was refused, or why it has ended."""

    @classmethod
    def of(
        cls, names: tuple[str, ...], steps: Integers, prediction: Prediction | None, errors: Mapping[str, RnnserveError]
    ) -> "BatchAnswer":
        """prediction: a row for each step."""
        outputs = np.zeros((0, 0), np.float32) if prediction is None else prediction.outputs
        return cls(
            sessions=names,
            steps=steps,
            outputs=outputs,
            labels=(prediction.labels if prediction is not None else ()) or (None,) * len(names),
            probabilities=None if prediction is None else prediction.probabilities,
            top=() if prediction is None else prediction.top,
            errors=errors,
        )


@dataclass(frozen=True, eq=False)
class Sent:
    """A step of each of some sessions, or a reset of each, for which `inputs` is None.

    numbers (n,) of the sessions; steps (n,) their indices; inputs (n, features) float32, or (n,) characters.
    """

    numbers: Integers
    steps: Integers
    inputs: npt.NDArray[Any] | None

    @property
    def size_bytes(self) -> int:
        """What it counts in the replay buffer."""
        return 0 if self.inputs is None else self.inputs.nbytes

    def where(self, mask: npt.NDArray[np.bool_]) -> "Sent":
        """Only some of it."""
        if mask.all():
            return self
        return Sent(self.numbers[mask], self.steps[mask], None if self.inputs is None else self.inputs[mask])

    def parts(self, most_rows: int, most_bytes: int) -> "list[Sent]":
        """The same in pieces that fit a message."""
        if self.inputs is not None and len(self.inputs):
            row_bytes = self.inputs.nbytes // len(self.inputs) + ROW_OVERHEAD_BYTES
            most_rows = max(1, min(most_rows, (most_bytes - MESSAGE_OVERHEAD_BYTES) // row_bytes))
        if len(self.numbers) <= most_rows:
            return [self]
        rows = np.arange(len(self.numbers)) // most_rows
        return [self.where(rows == part) for part in range(rows[-1] + 1)]


class Kept:
    """What the server may still ask for, in order, for all sessions together.

    That is what has no answer and, where the server survives a crash, what is behind its last checkpoint.
    """

    def __init__(self, limit_bytes: int, when_full: WhenReplayFull) -> None:
        check_replay(limit_bytes, when_full)
        self._limit_bytes = limit_bytes
        self._drops = when_full == "drop"
        self._sent: deque[Sent] = deque()
        self._size_bytes = 0

    def __iter__(self) -> Iterator[Sent]:
        return iter(self._sent)

    @property
    def full(self) -> bool:
        """Whether nothing more should be sent for now."""
        return self._size_bytes > self._limit_bytes

    def add(self, sent: Sent) -> None:
        """The newest."""
        self._sent.append(sent)
        self._size_bytes += sent.size_bytes

    def prune(self, columns: "Columns") -> None:
        """Drops what was answered and is durable, from the oldest on."""
        while self._sent and _is_over(self._sent[0], columns):
            self._drop_oldest(columns)
        while self._drops and self.full and _is_answered(self._sent[0], columns).all():
            self._drop_oldest(columns)

    def drop_from(self, end: Integers, columns: "Columns") -> None:
        """Drops the steps of each session, by its number, from that one on; resets that were done stay."""
        self._sent = deque(
            sent.where((sent.steps < end[sent.numbers]) | _is_reset(sent, columns)) for sent in self._sent
        )
        self._size_bytes = sum(sent.size_bytes for sent in self._sent)

    def _drop_oldest(self, columns: "Columns") -> None:
        sent = self._sent.popleft()
        self._size_bytes -= sent.size_bytes
        behind = sent.steps + (sent.inputs is not None)
        columns.kept_step[sent.numbers] = np.maximum(columns.kept_step[sent.numbers], behind)


def _is_reset(sent: Sent, columns: "Columns") -> npt.NDArray[np.bool_]:
    return (columns.reset_step[sent.numbers] >= sent.steps) & (sent.inputs is None)


def _is_answered(sent: Sent, columns: "Columns") -> npt.NDArray[np.bool_]:
    answered = columns.answered_step[sent.numbers] > sent.steps
    return answered | _is_reset(sent, columns) | (columns.gone[sent.numbers] > 0)


def _is_over(sent: Sent, columns: "Columns") -> bool:
    """A reset is known to be durable once a step behind it is."""
    n = sent.numbers
    durable = (columns.stored[n] == 0) | (columns.durable_step[n] > sent.steps) | (columns.gone[n] > 0)
    return bool((_is_answered(sent, columns) & durable).all())


@dataclass(frozen=True, eq=False)
class Arrived:
    """Answers to a step of each of some sessions, by their numbers: (n,); or why there is none."""

    numbers: Integers
    steps: Integers
    prediction: Prediction | None
    errors: Mapping[int, RnnserveError]

    @classmethod
    def from_prediction(
        cls, numbers: Integers, steps: Integers, message: prediction_pb2.Prediction, rows: npt.NDArray[np.bool_]
    ) -> "Arrived":
        """Of these rows of a message."""
        return cls(numbers, steps, prediction_from(message), {}).where(rows)

    @property
    def needed_prediction(self) -> Prediction:
        """Raises RnnserveError where there is none."""
        if self.prediction is None:
            raise RnnserveError("the server answered without an output")
        return self.prediction

    def where(self, rows: npt.NDArray[np.bool_]) -> "Arrived":
        """Only some of the answers."""
        if rows.all():
            return self
        prediction = rows_of(self.needed_prediction, np.nonzero(rows)[0].tolist())
        return Arrived(self.numbers[rows], self.steps[rows], prediction, {})

    @classmethod
    def from_errors(cls, errors: Mapping[int, RnnserveError]) -> "Arrived":
        """Nothing but these."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, None, errors)


def rows_of(prediction: Prediction, rows: Sequence[int]) -> Prediction:
    """Only some rows, in that order."""
    return Prediction(
        outputs=prediction.outputs[rows],
        labels=tuple(prediction.labels[row] for row in rows) if prediction.labels else (),
        probabilities=None if prediction.probabilities is None else prediction.probabilities[rows],
        top=tuple(prediction.top[row] for row in rows) if prediction.top else (),
    )


def integers(numbers: Collection[int]) -> Integers:
    """(n,)."""
    return np.fromiter(numbers, np.int64, len(numbers))


def rows_from(x: Input | Sequence[str], sessions: int) -> npt.NDArray[Any]:
    """(sessions, features), or a text or texts of one character for each session -> a row for each.

    Raises ShapeMismatch, DataTypeMismatch, NotFinite.
    """
    if isinstance(x, str) or (isinstance(x, Sequence) and x and isinstance(x[0], str)):
        rows: npt.NDArray[Any] = np.array(list(x))
        if rows.dtype.kind != "U" or rows.dtype.itemsize > np.dtype("U1").itemsize:
            raise _mismatch("a step of a text model is one character for each session")
    else:
        rows = batch_rows(x)
    if len(rows) != sessions:
        raise _mismatch(f"there are {len(rows)} steps for {sessions} sessions")
    return rows


def steps_request(handles: Integers, sent: Sent, answered_steps: Integers) -> pb.MultiplexStepsRequest:
    """The steps as a message."""
    request = pb.MultiplexStepsRequest()
    batch = request.steps
    batch.handles.extend(handles.tolist())
    batch.first_steps.extend(sent.steps.tolist())
    batch.answered_steps.extend(answered_steps.tolist())
    if sent.inputs is None:
        raise ValueError("a reset has no steps")
    if sent.inputs.dtype.kind == "U":
        batch.text = "".join(sent.inputs.tolist())
    else:
        batch.tensor.CopyFrom(tensor_from(sent.inputs))
    return request


def _mismatch(message: str) -> ShapeMismatch:
    return ShapeMismatch(message, reason="SHAPE_MISMATCH", code="INVALID_ARGUMENT")
