"""Our blocking client at work on a script; it records a line for each answer, with the point to resume from.

`python -m tests.chaos.client TARGET RECORD`, with the session and the script on stdin, is one that may be killed: the
next one goes on from the last whole line.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnnserve import Answer, Client, ResumePoint, Stream
from tests.chaos import broken
from tests.chaos.plans import STEPS, Script

TIMEOUT_S = 1.0
RESUME_TIMEOUT_S = 15.0

Row = tuple[int, tuple[float, ...]]


@dataclass
class Watched:
    """The message of a step that the harness wants to know of: before and after it was given to the stream."""

    step: int
    giving: Callable[[], None]
    given: Callable[[], None]


def run_script(
    target: str,
    session: str,
    script: Script,
    record: Callable[[Row | None, ResumePoint], None],
    *,
    resume: ResumePoint | None = None,
    watched: Watched | None = None,
    before_last: Callable[[], None] = lambda: None,
) -> None:
    """All steps of the script, or those that a resumed session has not seen yet."""
    with Client(target, timeout_s=TIMEOUT_S, resume_timeout_s=RESUME_TIMEOUT_S) as client:
        stream = client.stream("accumulator", session=None if resume else session, resume=resume)
        if script.sends_again_twice:
            _send_again_twice(stream)
        with stream:

            def note(answers: Iterable[Answer]) -> None:
                for answer in answers:
                    record(_row(answer), ResumePoint(*stream.resume_point[:2], answer.step + 1))

            if resume is None:
                record(None, stream.resume_point)
            note(stream.missed)
            first = stream.next_step
            for start, end in _segments(script, first):
                if start in script.resets:
                    stream.reset()
                note(stream.steps(_inputs(script, start, end, watched), ahead=script.ahead))
            if first <= STEPS:
                before_last()
                if STEPS in script.resets:
                    stream.reset()
                note([stream.step(np.array([script.values[STEPS]], np.float32))])


def _send_again_twice(stream: Stream) -> None:
    """Ours sends nothing that the server has; another client may, and the server must bear it."""
    session = stream._session
    send_again = session._send_again
    broken.put(session, "_send_again", lambda again, index: send_again([m for m in again for _ in range(2)], index))


def _segments(script: Script, first: int) -> list[tuple[int, int]]:
    """Between resets; a reset at `first` may be done or not, and is done again."""
    edges = [first, *(reset for reset in script.resets if first < reset < STEPS), STEPS]
    return [(start, end) for start, end in itertools.pairwise(edges) if start < end]


def _inputs(script: Script, first: int, end: int, watched: Watched | None) -> Iterator[np.ndarray[tuple[int, int]]]:
    for start, stop in script.messages(first, end):
        message = np.array(script.values[start:stop], np.float32).reshape(-1, 1)
        is_watched = watched is not None and start <= watched.step < stop
        time.sleep(script.pause_s)  # the pace of the script
        if watched is not None and is_watched:
            watched.giving()
        yield message
        if watched is not None and is_watched:
            watched.given()


def _row(answer: Answer) -> Row:
    return answer.step, tuple(map(float, answer.output))


def read_record(file: Path) -> tuple[list[Row], ResumePoint | None]:
    """The whole lines of a record."""
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    rows: list[Row] = [(line["step"], tuple(line["output"])) for line in lines if "step" in line]
    return rows, ResumePoint(*lines[-1]["point"]) if lines else None


def main(target: str, file_name: str) -> None:
    given = json.loads(sys.stdin.readline())
    broken.break_client(given["break"])
    script = script_from(given["script"])
    file = Path(file_name)
    _, resume = read_record(file)
    text = file.read_text() if file.exists() else ""
    file.write_text(text[: text.rfind("\n") + 1])  # a torn line goes
    with file.open("a") as lines:

        def record(row: Row | None, point: ResumePoint) -> None:
            about = {"step": row[0], "output": row[1]} if row else {}
            lines.write(json.dumps({**about, "point": point}) + "\n")
            lines.flush()

        def tell(event: str) -> Callable[[], None]:
            def ask() -> None:
                print(event, flush=True)
                sys.stdin.readline()

            return ask

        watched = Watched(given["watched"], tell("giving"), tell("given")) if given["watched"] is not None else None
        run_script(target, given["session"], script, record, resume=resume, watched=watched)
    print("done", flush=True)


def script_from(fields: dict[str, Any]) -> Script:
    """As `asdict` and JSON have made it."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Script(**plain)


def first_line(session: str, script: Script, watched_step: int | None, break_name: str) -> str:
    """What `main` reads first."""
    what = {"session": session, "script": asdict(script), "watched": watched_step, "break": break_name}
    return json.dumps(what) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
