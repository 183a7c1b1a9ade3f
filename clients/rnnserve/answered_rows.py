"""Answers to steps of many sessions, until the caller takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rnnserve.errors import RnnserveError
from rnnserve.results import BatchAnswer, TopLabel, prediction_from
from rnnserve.session_table import Ints, SessionTable
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


class Arrivals:
    """The answers that have come and that the caller does not have, in order."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._parts: list[AnsweredRows] = []
        self._like = NO_ROWS  # the last ones

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def numbers(self) -> set[int]:
        """Whose answers there are."""
        return {number for rows in self._parts for number in rows.numbers.tolist()}

    def add(self, rows: AnsweredRows) -> None:
        """The next answer to each of some sessions."""
        if len(rows):
            self._table.answered_step[rows.numbers] = rows.steps + 1
            self._parts.append(rows)
            self._like = rows

    def take_all(self, missing: Ints) -> AnsweredRows:
        """All of them, and rows without an answer."""
        rows = joined([*self._parts, self._like.missing(missing)] if len(missing) else self._parts)
        self._parts = []
        self._hand_over(rows.numbers)
        return rows

    def take_all_of(self, numbers: Ints) -> AnsweredRows:
        """All of these sessions."""
        is_wanted = np.zeros(self._table.capacity, np.bool_)
        is_wanted[numbers] = True
        taken = [rows.at(np.flatnonzero(is_wanted[rows.numbers])) for rows in self._parts]
        left = [rows.at(np.flatnonzero(~is_wanted[rows.numbers])) for rows in self._parts]
        self._parts = [rows for rows in left if len(rows)]
        self._hand_over(numbers)
        return joined([*taken, self._like.missing(numbers[:0])])

    def take(self, numbers: Ints, steps: Ints) -> AnsweredRows:
        """The answers about these steps, in their order; rows without an answer where none has come."""
        rows = self._parts[0] if len(self._parts) == 1 else NO_ROWS
        if np.array_equal(rows.numbers, numbers) and np.array_equal(rows.steps, steps):
            self._parts = []
        else:
            rows = self._picked(numbers, steps)
        self._hand_over(numbers)
        return rows

    def _picked(self, numbers: Ints, steps: Ints) -> AnsweredRows:
        place_of, step_of = np.full((2, self._table.capacity), -1)
        place_of[numbers], step_of[numbers] = np.arange(len(numbers)), steps
        picked, left = list[AnsweredRows](), list[AnsweredRows]()
        for rows in self._parts:
            is_wanted = step_of[rows.numbers] == rows.steps
            picked.append(rows.at(np.flatnonzero(is_wanted)))
            left.append(rows.at(np.flatnonzero(~is_wanted)))
        self._parts = [rows for rows in left if len(rows)]
        has_none = np.ones(len(numbers), np.bool_)
        for rows in picked:
            has_none[place_of[rows.numbers]] = False
        together = joined([*picked, self._like.missing(numbers[has_none])])
        return together.at(np.argsort(place_of[together.numbers]))

    def _hand_over(self, numbers: Ints) -> None:
        """The caller has got all answers of these but those that are left here."""
        table = self._table
        table.handed_step[numbers] = table.answered_step[numbers]
        for left in self._parts:
            table.handed_step[left.numbers] = np.minimum(table.handed_step[left.numbers], left.steps)


def _nan(rows: int, width: int) -> Array:
    return np.full((rows, width), np.nan, np.float32)
