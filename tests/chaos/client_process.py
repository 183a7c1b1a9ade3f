"""A client that may be killed: the next one goes on from the last whole line that it has written.

`python -m tests.chaos.client_process TARGET RECORD`, with the sessions and their scripts on stdin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rnnserve import ResumePoint, ResumePointLost, SessionMoved, SessionNotFound
from tests.chaos import broken
from tests.chaos.client import Event, Recorder, Watched, run_script
from tests.chaos.multiplexed_client import run_scripts
from tests.chaos.plans import STEPS, Plan, Script
from tests.chaos.record import Record, read_record, whole_lines


def main(target: str, file_name: str) -> None:
    given = json.loads(sys.stdin.readline())
    broken.break_client(given["break"])
    scripts = {session: script_from(fields) for session, fields in given["scripts"].items()}
    file = Path(file_name)
    file.write_text(whole_lines(file))
    known = {session: read_record(file, session) for session in scripts}
    with file.open("a") as lines:

        def record(session: str, event: Event, point: ResumePoint) -> None:
            if event not in (*known[session].rows, *known[session].resets):  # not done again from an earlier step
                lines.write(json.dumps((session, event, point)) + "\n")
                lines.flush()

        watched = Watched(**given["watched"], giving=partial(_ask, "giving"), made=partial(_ask, "made"))
        told: dict[str, Any] = {
            "watched": watched if given["watches"] else None,
            "resumed": partial(_ask, "resumed"),
            "before_last": partial(_ask, "before_last"),
        }
        may_lose_steps = given["may_lose_steps"]
        try:
            if given["is_multiplexed"]:
                run_scripts(target, scripts, record, known=known, may_lose_steps=may_lose_steps, **told)
            else:
                ((session, script),) = scripts.items()
                run = partial(run_script, target, session, script, record, **told)
                _run_from(known[session], run, record, may_lose_steps=may_lose_steps)
        except SessionMoved:
            print("moved", flush=True)
            return
    print("done", flush=True)


def _run_from(known: Record, run: Callable[..., None], record: Recorder, *, may_lose_steps: bool) -> None:
    """What its last life has left to do on its stream."""
    resume = known.point
    try:
        run(resume=resume, resets_done=known.resets)
    except ResumePointLost as lost:
        if not may_lose_steps or resume is None:
            raise
        next_step = int(lost.metadata["expected_step"])
        again = resume._replace(answered_step=next_step, reset=False)
        run(resume=again, resets_done=[reset for reset in known.resets if reset < next_step])
    except SessionNotFound:  # its last life did not hear that it was closed, or began nothing that lasted
        if not may_lose_steps and len(known.rows) <= STEPS:
            raise
        if len(known.rows) <= STEPS:
            run()
        elif resume is not None:
            record(resume.session, "erased", resume)


def _ask(event: str) -> None:
    """Tell the harness, and wait until it says go."""
    print(event, flush=True)
    sys.stdin.readline()


def script_from(fields: dict[str, Any]) -> Script:
    """As `asdict` and JSON have made it."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Script(**plain)


def first_line(plan: Plan, break_name: str, *, watches: bool) -> str:
    """What `main` reads first."""
    what = {
        "scripts": {session: asdict(script) for session, script in plan.scripts.items()},
        "is_multiplexed": plan.is_multiplexed,
        "watched": {"target": plan.target, "step": plan.step},
        "watches": watches,
        "may_lose_steps": plan.fault == "both_die",
        "break": break_name,
    }
    return json.dumps(what) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
