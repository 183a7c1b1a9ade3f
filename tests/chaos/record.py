"""What a client process writes down: a line for each event of a session, with the point to resume from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rnnserve import ResumePoint
from tests.chaos.client import Row


@dataclass(frozen=True)
class Record:
    """What a client has written down: answers, the steps before which it was reset, and where it stands."""

    rows: list[Row]
    resets: list[int]
    erased: bool
    point: ResumePoint | None


def read_record(file: Path, session: str) -> Record:
    """What its whole lines say of a session."""
    lines = [line[1:] for line in map(json.loads, whole_lines(file).splitlines()) if line[0] == session]
    events = [event for event, _ in lines]
    rows: list[Row] = [(event[0], tuple(event[1])) for event in events if isinstance(event, list)]
    resets = [event for event in events if isinstance(event, int)]
    return Record(rows, resets, "erased" in events, ResumePoint(*lines[-1][1]) if lines else None)


def whole_lines(file: Path) -> str:
    """A torn one goes."""
    text = file.read_text() if file.exists() else ""
    return text[: text.rfind("\n") + 1]
