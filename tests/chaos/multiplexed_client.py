"""Our blocking client at work on the scripts of several sessions, on one multiplexed call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from rnnserve import (
    BatchAnswer,
    Client,
    Multiplex,
    ResumePoint,
    ResumePointLost,
    RnnserveError,
    SessionMoved,
    SessionNotFound,
)
from rnnserve.session_table import Ints
from tests.chaos import broken
from tests.chaos.client import BEFORE_RESET_S, RESUME_TIMEOUT_S, TIMEOUT_S, Recorder, Row, Watched
from tests.chaos.plans import STEPS, Script
from tests.chaos.record import Record


class StepsAhead:
    """Sends a step of each session at a time, ahead of the answers. A session that is taken over leaves the others."""

    def __init__(self, multiplex: Multiplex, ahead: int, note: Callable[[str, Row], None]) -> None:
        self._multiplex = multiplex
        self._ahead = ahead
        self._note = note
        self._owed = 0
        self._moved: RnnserveError | None = None

    @property
    def sessions(self) -> list[str]:
        """Those that nobody has taken over. Raises SessionMoved if there are none."""
        if self._moved is not None and not self._multiplex.sessions:
            raise self._moved
        return self._multiplex.sessions

    def send(self, values: Mapping[str, float]) -> None:
        """The next step of each of these, and take the answers that have come. Raises the error of a session."""
        self._multiplex.send(list(values), column(values.values()))
        self._owed += len(values)
        while self._owed > self._ahead * len(values):
            self._receive()
        self._receive(0.0)

    def step(self, values: Mapping[str, float]) -> None:
        """The next step of each of these, and its answer. Raises the error of a session."""
        self._take(self._multiplex.step(list(values), column(values.values())))

    def reset(self, sessions: Sequence[str]) -> None:
        """Behind what was sent. Raises the error of a session."""
        try:
            self._multiplex.reset(sessions)
        except SessionMoved as error:
            self._moved = error
        self.settle()

    def settle(self) -> None:
        """Take all answers that are still to come. Raises the error of a session."""
        while self._receive():
            pass

    def _receive(self, timeout_s: float | None = None) -> bool:
        answers = self._multiplex.receive(timeout_s)
        if answers is not None:
            self._owed -= len(answers.sessions)
            self._take(answers)
        elif timeout_s is None:
            self._owed = 0
        return answers is not None

    def _take(self, answers: BatchAnswer) -> None:
        for session, row in rows_of(answers):
            self._note(session, row)
        for error in answers.errors.values():
            if not isinstance(error, SessionMoved):
                raise error
            self._moved = error


def run_scripts(
    target: str,
    scripts: Mapping[str, Script],
    record: Recorder,
    *,
    known: Mapping[str, Record] | None = None,
    may_lose_steps: bool = False,
    watched: Watched | None = None,
    resumed: Callable[[], None] = lambda: None,
    before_last: Callable[[], None] = lambda: None,
) -> None:
    """All steps of all scripts, which differ in their values alone, or those that resumed sessions have not seen."""
    with (
        Client(target, timeout_s=TIMEOUT_S, resume_timeout_s=RESUME_TIMEOUT_S) as client,
        client.multiplex("accumulator") as multiplex,
    ):
        work = _ScriptsAtWork(multiplex, scripts, record, watched)
        if any(former.point for former in (known or {}).values()):
            work.go_on(known or {}, may_lose_steps=may_lose_steps)
            resumed()
        else:
            work.begin(list(scripts))
        for step in range(work.next_step, STEPS):
            work.do(step)
        if work.next_step == STEPS:
            work.settle()
            before_last()
            work.step(work.values(STEPS))
        points = {session: multiplex.resume_point(session) for session in work.sessions}
    not_erased = {notice.session for notice in multiplex.notices if notice.reason == "not_erased"}
    for session in points.keys() - not_erased:
        record(session, "erased", points[session])


class _ScriptsAtWork(StepsAhead):
    """Does what the scripts say, and writes down what comes of it."""

    def __init__(
        self, multiplex: Multiplex, scripts: Mapping[str, Script], record: Recorder, watched: Watched | None
    ) -> None:
        self._script, *_ = scripts.values()
        super().__init__(multiplex, self._script.ahead, self._note_row)
        self._scripts = scripts
        self._record = record
        self._watched = watched
        self._resets_done: dict[str, list[int]] = {session: [] for session in scripts}
        if self._script.sends_again_twice:
            _send_again_twice(multiplex)
        if watched is not None:
            watched.watch_first(multiplex)

    @property
    def next_step(self) -> int:
        """Of the session that is the furthest behind."""
        return min(map(self._multiplex.next_step, self.sessions), default=STEPS + 1)

    def begin(self, sessions: Sequence[str]) -> None:
        """New ones."""
        self._multiplex.open(sessions)
        for session in sessions:
            self._record(session, "opened", self._multiplex.resume_point(session))

    def go_on(self, known: Mapping[str, Record], *, may_lose_steps: bool) -> None:
        """With what their last life has left to do."""
        for session, former in known.items():
            assert former.point is not None
            self._resets_done[session] = former.resets
            try:
                self._multiplex.open(resume=[former.point])
            except ResumePointLost as lost:
                if not may_lose_steps:
                    raise
                next_step = int(lost.metadata["expected_step"])
                self._resets_done[session] = [reset for reset in former.resets if reset < next_step]
                self._multiplex.open(resume=[former.point._replace(answered_step=next_step, reset=False)])
            except SessionNotFound:  # it did not hear that it was closed, or began nothing that lasted
                if len(former.rows) > STEPS:
                    self._record(session, "erased", former.point)
                elif may_lose_steps:
                    self._resets_done[session] = []
                    self.begin([session])
                else:
                    raise
        self.settle()

    def do(self, step: int) -> None:
        """Send the step to each session whose next one it is, and what the script has before it."""
        self._reset_before(step)
        if step in (0, *self._script.message_ends):
            time.sleep(self._script.pause_s)
        if self._watched is not None and self._watched.concerns("steps", step, 1):
            self.settle()
            self._watched.giving()
        self.send(self.values(step))

    def values(self, step: int) -> dict[str, float]:
        """Of the sessions whose next step it is."""
        coming = [session for session in self.sessions if self._multiplex.next_step(session) == step]
        return {session: self._scripts[session].values[step] for session in coming}

    def _reset_before(self, step: int) -> None:
        sessions = [session for session in self.values(step) if step not in self._resets_done[session]]
        if step not in self._script.resets or not sessions:
            return
        time.sleep(BEFORE_RESET_S)
        if self._watched is not None and self._watched.concerns("reset", step, 1):
            self.settle()
        self.reset(sessions)
        for session in sessions:
            self._record(session, step, self._multiplex.resume_point(session))

    def _note_row(self, session: str, row: Row) -> None:
        self._record(session, row, ResumePoint(*self._multiplex.resume_point(session)[:2], row[0] + 1))


def _send_again_twice(multiplex: Multiplex) -> None:
    """Ours sends nothing that the server has; another client may, and the server must bear it."""
    sessions = multiplex._sessions
    make_wait_again, backlog = sessions._make_wait_again, sessions._backlog

    def make_wait_twice(numbers: Ints) -> None:
        make_wait_again(numbers)
        waiting = list(backlog._batches)
        backlog.clear()
        for batch in waiting:
            for _ in range(1 if batch.kind == "close" else 2):
                backlog.add(batch)

    broken.put(sessions, "_make_wait_again", make_wait_twice)


def rows_of(answers: BatchAnswer) -> list[tuple[str, Row]]:
    """Those of the steps that were not refused, and whose they are."""
    rows = zip(answers.sessions, answers.steps.tolist(), answers.outputs.tolist(), strict=True)
    return [(session, (step, tuple(output))) for session, step, output in rows if step >= 0]


def column(values: Iterable[float]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """A row of one feature for each value."""
    return np.array(list(values), np.float32).reshape(-1, 1)
