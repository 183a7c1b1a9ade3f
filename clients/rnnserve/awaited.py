"""What is waited for on a multiplexed stream, without I/O."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rnnserve.batches import Arrived, BatchAnswer, Integers, rows_of
from rnnserve.errors import RnnserveError
from rnnserve.exchange import CallEnded, Event, Response, Turn
from rnnserve.multiplexed import Multiplexed, MultiplexTurn, Request
from rnnserve.results import Prediction
from rnnserve.v1.real_time_service_pb2 import MultiplexStepsResponse

_Event = Event[None, MultiplexStepsResponse]


class Awaited:
    """Requests, made once there is room for them, and then what arrives until there is enough."""

    def __init__(
        self,
        multiplexed: Multiplexed,
        make_requests: Callable[[], list[Request]] | None = None,
        enough: Callable[[], bool] = lambda: True,
        *,
        needs_room: bool = False,
    ) -> None:
        self._multiplexed = multiplexed
        self._make_requests = make_requests
        self._enough = enough
        self._needs_room = needs_room

    @property
    def failure(self) -> RnnserveError | None:
        """To be raised once all is done. What happens to one session alone is among the results."""
        return self._multiplexed.failure

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer, or the room to send more."""
        return self._multiplexed.owes or self._make_requests is not None

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.failure is not None or (self._make_requests is None and self._enough())

    def begin(self) -> MultiplexTurn:
        """What to do first."""
        return self._followed(self._multiplexed.begin())

    def handle(self, event: _Event) -> MultiplexTurn:
        """What to do now."""
        match event:
            case Response(message):
                return self._followed(self._multiplexed.handle(message))
            case CallEnded(error):
                return self._followed(self._multiplexed.cut(error))
        return Turn()

    def _followed(self, turn: MultiplexTurn) -> MultiplexTurn:
        """The same, and behind it what can be made now."""
        if self._make_requests is None or self.failure or (self._needs_room and self._multiplexed.full):
            return turn
        make_requests, self._make_requests = self._make_requests, None
        return replace(turn, requests=[*turn.requests, *make_requests()])


class StepOfEach(Awaited):
    """A step of each of some sessions, and its answers; others that come meanwhile are left in `others`."""

    def __init__(
        self, multiplexed: Multiplexed, names: Sequence[str], numbers: Integers, inputs: npt.NDArray[Any]
    ) -> None:
        """numbers (sessions,), inputs: a row for each."""
        super().__init__(multiplexed, self._steps, lambda: self._missing == 0, needs_room=True)
        self.others: list[Arrived] = []
        self._names = tuple(names)
        self._numbers = numbers
        self._inputs = inputs
        self._sent_steps = np.full(len(numbers), -1)
        self._row_of = np.full(len(multiplexed.columns.gone), -1)
        self._row_of[numbers] = np.arange(len(numbers))
        self._parts: list[tuple[Integers, Prediction]] = []
        self._errors = {
            row: failure for row, number in enumerate(numbers.tolist()) if (failure := multiplexed.failure_of(number))
        } if multiplexed.columns.gone[numbers].any() else {}  # fmt: skip
        self._missing = len(numbers) - len(self._errors)

    def begin(self) -> MultiplexTurn:
        return self._taken(super().begin())

    def handle(self, event: _Event) -> MultiplexTurn:
        return self._taken(super().handle(event))

    def answer(self) -> BatchAnswer:
        """A row for each of the sessions, in their order."""
        errors = {self._names[row]: error for row, error in self._errors.items()}
        if len(self._parts) == 1 and not errors:
            rows, prediction = self._parts[0]
            if not np.array_equal(rows, np.arange(len(rows))):
                prediction = rows_of(prediction, np.argsort(rows).tolist())
            return BatchAnswer.of(self._names, self._sent_steps, prediction, errors)
        steps = self._sent_steps.copy()
        steps[list(self._errors)] = -1
        return BatchAnswer.of(self._names, steps, self._joined(), errors)

    def _steps(self) -> list[Request]:
        c = self._multiplexed.columns
        alive = c.gone[self._numbers] == 0
        self._sent_steps[alive] = c.next_step[self._numbers[alive]]
        return self._multiplexed.steps(self._numbers[alive], self._inputs[alive]) if alive.any() else []

    def _taken(self, turn: MultiplexTurn) -> MultiplexTurn:
        for arrived in turn.results:
            self._take(arrived)
        return replace(turn, results=())

    def _take(self, arrived: Arrived) -> None:
        if arrived.prediction is not None:
            rows = self._row_of[arrived.numbers]
            ours = (rows >= 0) & (arrived.steps == self._sent_steps[rows])
            if ours.any():
                self._multiplexed.hand_over(mine := arrived.where(ours))
                self._parts.append((rows[ours], mine.needed_prediction))
                self._missing -= int(ours.sum())
            if not ours.all():
                self.others.append(arrived.where(~ours))
        for number, error in arrived.errors.items():
            row = int(self._row_of[number])
            if row >= 0 and row not in self._errors:
                self._errors[row] = error
                self._missing -= 1
            elif row < 0:
                self.others.append(Arrived.from_errors({number: error}))

    def _joined(self) -> Prediction:
        """All parts, each row in its place; the others are not numbers."""
        count = len(self._numbers)
        outputs = _in_place(count, [(rows, part.outputs) for rows, part in self._parts])
        labels: list[Any] = [None] * count
        top: list[Any] = [()] * count
        for rows, part in self._parts:
            for place, row in enumerate(rows.tolist()):
                labels[row] = part.labels[place] if part.labels else None
                top[row] = part.top[place] if part.top else ()
        with_probabilities = [(rows, p.probabilities) for rows, p in self._parts if p.probabilities is not None]
        return Prediction(
            outputs=outputs,
            labels=tuple(labels),
            probabilities=_in_place(count, with_probabilities) if with_probabilities else None,
            top=tuple(top) if any(top) else (),
        )


def _in_place(count: int, parts: Sequence[tuple[Integers, npt.NDArray[np.float32]]]) -> npt.NDArray[np.float32]:
    width = parts[0][1].shape[1] if parts else 0
    values = np.full((count, width), np.nan, np.float32)
    for rows, part in parts:
        values[rows] = part
    return values
