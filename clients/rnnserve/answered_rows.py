"""Answers to steps of many sessions that have come, until the caller takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnserve.errors import RnnserveError
from rnnserve.results import BatchAnswer, TopLabel, prediction_from
from rnnserve.session_table import Ints
from rnnserve.tensors import Array
from rnnserve.v1 import prediction_pb2


@dataclass(frozen=True, eq=False, slots=True)
class AnsweredRows:
    """An answer to a step of each of several sessions."""

    numbers: Ints
    """Whose."""
    steps: Ints
    outputs: Array
    labels: tuple[str | None, ...]
    probabilities: Array | None
    top: tuple[tuple[TopLabel, ...], ...]
    """Empty unless asked for."""

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, places: Ints) -> "AnsweredRows":
        """The rows at these places, in their order."""
        indices = places.tolist()
        return AnsweredRows(
            numbers=self.numbers[places],
            steps=self.steps[places],
            outputs=self.outputs[places],
            labels=tuple([self.labels[i] for i in indices]),
            probabilities=None if self.probabilities is None else self.probabilities[places],
            top=tuple([self.top[i] for i in indices]) if self.top else (),
        )

    def missing(self, numbers: Ints) -> "AnsweredRows":
        """Rows without an answer that look like these."""
        count, probabilities = len(numbers), self.probabilities
        return AnsweredRows(
            numbers=numbers,
            steps=np.full(count, -1),
            outputs=_nan(count, self.outputs.shape[1]),
            labels=(None,) * count,
            probabilities=None if probabilities is None else _nan(count, probabilities.shape[1]),
            top=((),) * count if self.top else (),
        )

    def answer(self, names: Sequence[str], errors: Mapping[str, RnnserveError]) -> BatchAnswer:
        """What the caller gets."""
        return BatchAnswer(
            sessions=tuple(names),
            steps=self.steps,
            outputs=self.outputs,
            labels=self.labels,
            probabilities=self.probabilities,
            top=self.top,
            errors=dict(errors),
        )


NO_ROWS = AnsweredRows(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 0), np.float32), (), None, ())


def rows_from(numbers: Ints, steps: Ints, message: prediction_pb2.Prediction) -> AnsweredRows:
    """A message of the wire, which may have no rows although there are numbers."""
    said = prediction_from(message)
    count = len(said.outputs)
    return AnsweredRows(
        numbers=numbers[:count],
        steps=steps[:count],
        outputs=said.outputs,
        labels=said.labels or (None,) * count,
        probabilities=said.probabilities,
        top=said.top,
    )


def joined(parts: Sequence[AnsweredRows]) -> AnsweredRows:
    """One behind the other."""
    if len(parts) == 1:
        return parts[0]
    probabilities = [part.probabilities for part in parts if part.probabilities is not None]
    return AnsweredRows(
        numbers=np.concatenate([part.numbers for part in parts]),
        steps=np.concatenate([part.steps for part in parts]),
        outputs=np.concatenate([part.outputs for part in parts]),
        labels=tuple([label for part in parts for label in part.labels]),
        probabilities=np.concatenate(probabilities) if probabilities else None,
        top=tuple([top for part in parts for top in part.top]),
    )


def _nan(rows: int, width: int) -> Array:
    return np.full((rows, width), np.nan, np.float32)
