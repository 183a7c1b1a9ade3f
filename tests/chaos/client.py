"""Our blocking client at work on the script of one session, on a stream."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rnnserve import Answer, Client, Multiplex, ResumePoint, Stream
from tests.chaos import broken
from tests.chaos.plans import STEPS, Script, Target

TIMEOUT_S = 1.0
RESUME_TIMEOUT_S = 15.0
BEFORE_RESET_S = 0.06  # longer than between two checkpoints, so that the last one does not know of the reset

Row = tuple[int, tuple[float, ...]]
Event = Row | int | Literal["opened", "resumed", "erased"]
"""An answer, a reset before the step of that index, the beginning, or the end, if nothing is left on the server."""
Recorder = Callable[[str, Event, ResumePoint], None]
"""Writes down what happened to a session, and where it stands."""


@dataclass
class Watched:
    """The message that the harness wants to know of: before it is given, and when it is made and no byte of it sent."""

    target: Target
    step: int
    giving: Callable[[], None]
    made: Callable[[], None]

    def watch(self, stream: Stream) -> None:
        """Of that stream."""
        session = stream._session
        self._watch(session, lambda *values: (session.next_step, len(values[0]) if values else 1))

    def watch_first(self, multiplex: Multiplex) -> None:
        """Of the first session of that call."""
        sessions = multiplex._sessions
        self._watch(sessions, lambda numbers, *_: (int(sessions.table.next_step[numbers[0]]), 1))

    def _watch(self, maker: object, coming: Callable[..., tuple[int, int]]) -> None:
        """`coming` says of a message from which step on it is, and of how many."""
        for name in ("steps", "reset", "close"):
            self._watch_one(maker, name, coming)

    def _watch_one(self, maker: object, name: str, coming: Callable[..., tuple[int, int]]) -> None:
        make = getattr(maker, name)

        def make_watched(*values: Any) -> Any:
            is_watched = self.concerns(name, *coming(*values))
            if is_watched and name != "steps":
                self.giving()
            message = make(*values)
            if is_watched:
                self.made()
            return message

        broken.put(maker, name, make_watched)

    def concerns(self, name: str, first: int, count: int) -> bool:
        """Whether it is a message of that name, with the next step of that index and so many."""
        return name == self.target and first <= self.step < first + count


def run_script(
    target: str,
    session: str,
    script: Script,
    record: Recorder,
    *,
    resume: ResumePoint | None = None,
    resets_done: Collection[int] = (),
    watched: Watched | None = None,
    resumed: Callable[[], None] = lambda: None,
    before_last: Callable[[], None] = lambda: None,
) -> None:
    """All steps of the script, or those that a resumed session has not seen yet."""
    with Client(target, timeout_s=TIMEOUT_S, resume_timeout_s=RESUME_TIMEOUT_S) as client:
        stream = client.stream("accumulator", session=None if resume else session, resume=resume)
        if script.sends_again_twice:
            _send_again_twice(stream)
        if watched is not None:
            watched.watch(stream)
        with stream:

            def note(answers: Iterable[Answer]) -> None:
                for answer in answers:
                    record(session, row_of(answer), ResumePoint(*stream.resume_point[:2], answer.step + 1))

            record(session, "resumed" if resume else "opened", stream.resume_point)
            if resume:
                resumed()
            note(stream.missed)
            first = stream.next_step
            for start, end in _segments(script, first):
                if start in script.resets and start not in resets_done:
                    time.sleep(BEFORE_RESET_S)
                    stream.reset()
                    record(session, start, stream.resume_point)
                note(stream.steps(_inputs(script, start, end, watched), ahead=script.ahead))
            if first <= STEPS:
                before_last()
                if STEPS in script.resets:
                    stream.reset()
                note([stream.step(np.array([script.values[STEPS]], np.float32))])
        if all(notice.reason != "not_erased" for notice in stream.notices):
            record(session, "erased", stream.resume_point)


def _send_again_twice(stream: Stream) -> None:
    """Ours sends nothing that the server has; another client may, and the server must bear it."""
    session = stream._session
    send_again = session._send_again
    broken.put(session, "_send_again", lambda again, *rest: send_again([m for m in again for _ in range(2)], *rest))


def _segments(script: Script, first: int) -> list[tuple[int, int]]:
    """Between resets."""
    edges = [first, *(reset for reset in script.resets if first < reset < STEPS), STEPS]
    return [(start, end) for start, end in itertools.pairwise(edges) if start < end]


def _inputs(script: Script, first: int, end: int, watched: Watched | None) -> Iterator[np.ndarray[tuple[int, int]]]:
    for start, stop in script.messages(first, end):
        time.sleep(script.pause_s)  # the pace of the script
        if watched is not None and watched.concerns("steps", start, stop - start):
            watched.giving()  # here, for answers are read meanwhile
        yield np.array(script.values[start:stop], np.float32).reshape(-1, 1)


def row_of(answer: Answer) -> Row:
    """What is recorded of it."""
    return answer.step, tuple(map(float, answer.output))
