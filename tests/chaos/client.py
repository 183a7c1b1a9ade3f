"""Our blocking client at work on a script; it records a line for each answer, with the point to resume from.

`python -m tests.chaos.client TARGET RECORD`, with the session and the script on stdin, is one that may be killed: the
next one goes on from the last whole line.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rnnserve import Answer, Client, ResumePoint, ResumePointLost, SessionMoved, SessionNotFound, Stream
from rnnserve.session import Session
from tests.chaos import broken
from tests.chaos.plans import STEPS, Plan, Script, Target

TIMEOUT_S = 1.0
RESUME_TIMEOUT_S = 15.0
BEFORE_RESET_S = 0.06  # longer than between two checkpoints, so that the last one does not know of the reset

Row = tuple[int, tuple[float, ...]]
Event = Row | int | Literal["opened", "resumed", "erased"]
"""An answer, a reset before the step of that index, the beginning, or the end, if nothing is left on the server."""


@dataclass
class Watched:
    """The message that the harness wants to know of: before it is given, and when it is made and no byte of it sent."""

    target: Target
    step: int
    giving: Callable[[], None]
    made: Callable[[], None]

    def watch(self, stream: Stream) -> None:
        """Of that stream."""
        for name in ("steps", "reset", "close"):
            self._watch(stream._session, name)

    def _watch(self, session: Session, name: str) -> None:
        make = getattr(session, name)

        def make_watched(*values: Any) -> Any:
            is_watched = self.concerns(name, session.next_step, len(values[0]) if values else 1)
            if is_watched and name != "steps":
                self.giving()
            message = make(*values)
            if is_watched:
                self.made()
            return message

        broken.put(session, name, make_watched)

    def concerns(self, name: str, first: int, count: int) -> bool:
        """Whether it is a message of that name, with the next step of that index and so many."""
        return name == self.target and first <= self.step < first + count


def run_script(
    target: str,
    session: str,
    script: Script,
    record: Callable[[Event, ResumePoint], None],
    *,
    resume: ResumePoint | None = None,
    resets_done: Collection[int] = (),
    watched: Watched | None = None,
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
                    record(_row(answer), ResumePoint(*stream.resume_point[:2], answer.step + 1))

            record("resumed" if resume else "opened", stream.resume_point)
            note(stream.missed)
            first = stream.next_step
            for start, end in _segments(script, first):
                if start in script.resets and start not in resets_done:
                    time.sleep(BEFORE_RESET_S)
                    stream.reset()
                    record(start, stream.resume_point)
                note(stream.steps(_inputs(script, start, end, watched), ahead=script.ahead))
            if first <= STEPS:
                before_last()
                if STEPS in script.resets:
                    stream.reset()
                note([stream.step(np.array([script.values[STEPS]], np.float32))])
        if all(notice.reason != "not_erased" for notice in stream.notices):
            record("erased", stream.resume_point)


def _send_again_twice(stream: Stream) -> None:
    """Ours sends nothing that the server has; another client may, and the server must bear it."""
    session = stream._session
    send_again = session._send_again
    broken.put(session, "_send_again", lambda again, index: send_again([m for m in again for _ in range(2)], index))


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


def _row(answer: Answer) -> Row:
    return answer.step, tuple(map(float, answer.output))


@dataclass(frozen=True)
class Record:
    """What a client has written down: answers, the steps before which it was reset, and where it stands."""

    rows: list[Row]
    resets: list[int]
    erased: bool
    point: ResumePoint | None


def read_record(file: Path) -> Record:
    """Its whole lines."""
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    events = [event for event, _ in lines]
    rows: list[Row] = [(event[0], tuple(event[1])) for event in events if isinstance(event, list)]
    resets = [event for event in events if isinstance(event, int)]
    return Record(rows, resets, "erased" in events, ResumePoint(*lines[-1][1]) if lines else None)


def main(target: str, file_name: str) -> None:
    given = json.loads(sys.stdin.readline())
    broken.break_client(given["break"])
    script = script_from(given["script"])
    file = Path(file_name)
    known = read_record(file)
    resume = known.point
    text = file.read_text() if file.exists() else ""
    file.write_text(text[: text.rfind("\n") + 1])  # a torn line goes
    with file.open("a") as lines:

        def record(event: Event, point: ResumePoint) -> None:
            if event in (*known.rows, *known.resets):  # done again from an earlier step
                return
            lines.write(json.dumps((event, point)) + "\n")
            lines.flush()
            if event == "resumed":
                tell("resumed")()

        def tell(event: str) -> Callable[[], None]:
            def ask() -> None:
                print(event, flush=True)
                sys.stdin.readline()

            return ask

        watched = Watched(**given["watched"], giving=tell("giving"), made=tell("made")) if given["watched"] else None
        run = partial(
            run_script, target, given["session"], script, record, watched=watched, before_last=tell("before_last")
        )
        try:
            run(resume=resume, resets_done=known.resets)
        except ResumePointLost as lost:
            if not given["may_lose_steps"] or resume is None:
                raise
            next_step = int(lost.metadata["expected_step"])
            again = resume._replace(answered_step=next_step, reset=False)
            run(resume=again, resets_done=[reset for reset in known.resets if reset < next_step])
        except SessionNotFound:  # its last life did not hear that it was closed, or began nothing that lasted
            if not given["may_lose_steps"] and len(known.rows) <= STEPS:
                raise
            if len(known.rows) <= STEPS:
                run()
            elif resume is not None:
                record("erased", resume)
        except SessionMoved:
            print("moved", flush=True)
            return
    print("done", flush=True)


def script_from(fields: dict[str, Any]) -> Script:
    """As `asdict` and JSON have made it."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Script(**plain)


def first_line(plan: Plan, break_name: str, *, watches: bool) -> str:
    """What `main` reads first."""
    what = {
        "session": plan.session,
        "script": asdict(plan.script),
        "watched": {"target": plan.target, "step": plan.step} if watches else None,
        "may_lose_steps": plan.fault == "both_die",
        "break": break_name,
    }
    return json.dumps(what) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
