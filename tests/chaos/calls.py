"""What a client of a fleet works on: a stream of one session, or a multiplexed call of several."""

from __future__ import annotations

import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from rnnserve import Client, Notice, ResumePoint
from tests.chaos.client import Row, row_of
from tests.chaos.multiplexed_client import StepsAhead, column, rows_of

STEPS = 60
AHEAD = 4
PACE_S = 0.01
SLOW_PACE_S = 0.05  # of a client that only waits for the end of a fault: its sums stay exact however long that is

OnNotice = Callable[[Notice], None]


@dataclass
class Worked:
    """What came of a session."""

    seed: int
    number: int
    rows: list[Row] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    interrupted: bool = False
    error: BaseException | None = None

    @property
    def session(self) -> str:
        return f"fleet-{self.seed}-{self.number}"

    def note(self, rows: Iterable[Row]) -> None:
        """Answers that have come now."""
        for row in rows:
            self.rows.append(row)
            self.times_s.append(time.monotonic())

    def value(self, index: int) -> float:
        """Of a step; small, so that the sums of sums stay exact (below 2^24) over some thousand steps."""
        return float((self.seed * 31 + self.number * 17 + index * index * 7) % 3)


class Call(ABC):
    """Of a client, which notes each answer."""

    def __init__(self, client: Client, on_notice: OnNotice = lambda notice: None) -> None:
        self._client = client
        self._on_notice = on_notice

    @abstractmethod
    def begin(self, sessions: Sequence[Worked]) -> None:
        """New sessions, with which nothing else was done."""

    @abstractmethod
    def take_over(self, one: Worked, point: ResumePoint) -> None:
        """A session that another call has. Raises what the client does, and then the call is over."""

    @abstractmethod
    def resume_point(self, one: Worked) -> ResumePoint:
        """Where the session stands."""

    @abstractmethod
    def durable_step(self, one: Worked) -> int:
        """What survives a crash of the server."""

    @abstractmethod
    def step(self, one: Worked) -> None:
        """The next step; what the session has missed is noted before its answer. Raises SessionMoved."""

    @abstractmethod
    def work(self, over: threading.Event, end: int | None = None) -> None:
        """Steps of all sessions that are left up to the end, or until the fault is over, and at least so many."""

    @abstractmethod
    def close(self) -> None:
        """End all sessions that are left."""


class StreamCall(Call):
    """Of one session."""

    def begin(self, sessions: Sequence[Worked]) -> None:
        (self._one,) = sessions
        self._stream = self._client.stream("accumulator", session=self._one.session, on_notice=self._on_notice)
        self._stream.open()

    def take_over(self, one: Worked, point: ResumePoint) -> None:
        self._one = one
        self._stream = self._client.stream("accumulator", resume=point, on_notice=self._on_notice)
        self._stream.open()

    def resume_point(self, one: Worked) -> ResumePoint:
        return self._stream.resume_point

    def durable_step(self, one: Worked) -> int:
        return self._stream.durable_step

    def step(self, one: Worked) -> None:
        answer = self._stream.step(column([one.value(self._stream.next_step)]))
        one.note(map(row_of, (*self._stream.missed, answer)))

    def work(self, over: threading.Event, end: int | None = None) -> None:
        indices = _paced(self._stream.next_step, end, over)
        inputs = (column([self._one.value(index)]) for index in indices)
        for answer in self._stream.steps(inputs, ahead=AHEAD):
            self._one.note([row_of(answer)])

    def close(self) -> None:
        self._stream.close()


class MultiplexedCall(Call):
    """Of several sessions."""

    def __init__(self, client: Client, on_notice: OnNotice = lambda notice: None) -> None:
        super().__init__(client, on_notice)
        self._sessions: dict[str, Worked] = {}
        self._multiplex = client.multiplex("accumulator", on_notice=on_notice)
        self._ahead = StepsAhead(self._multiplex, AHEAD, lambda session, row: self._sessions[session].note([row]))

    def begin(self, sessions: Sequence[Worked]) -> None:
        self._sessions = {one.session: one for one in sessions}
        self._multiplex.__enter__()
        self._multiplex.open(list(self._sessions))

    def take_over(self, one: Worked, point: ResumePoint) -> None:
        self._sessions = {one.session: one}
        with ExitStack() as stack:
            stack.enter_context(self._multiplex)
            self._multiplex.open(resume=[point])
            stack.pop_all()

    def resume_point(self, one: Worked) -> ResumePoint:
        return self._multiplex.resume_point(one.session)

    def durable_step(self, one: Worked) -> int:
        return self._multiplex.durable_step(one.session)

    def step(self, one: Worked) -> None:
        index = self._multiplex.next_step(one.session)
        answers = self._multiplex.step([one.session], column([one.value(index)]))
        for error in answers.errors.values():
            raise error
        missed = self._multiplex.receive(timeout_s=0.0)
        one.note(row for _, row in (*(rows_of(missed) if missed else ()), *rows_of(answers)))

    def work(self, over: threading.Event, end: int | None = None) -> None:
        left = [self._sessions[session] for session in self._ahead.sessions]
        for index in _paced(self._multiplex.next_step(left[0].session), end, over):
            self._ahead.send({one.session: one.value(index) for one in left})
        self._ahead.settle()

    def close(self) -> None:
        self._multiplex.close()


def _paced(first: int, end: int | None, over: threading.Event) -> Iterator[int]:
    for index in itertools.count(first):
        if index == end or (index >= STEPS and over.is_set()):
            return
        time.sleep(PACE_S if index < STEPS else SLOW_PACE_S)
        yield index
