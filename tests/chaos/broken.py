"""Breaks the real code on purpose, to see whether the harness notices."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnnserve.batches import BatchReplay
from rnnserve.multiplexed import Multiplexed
from rnnserve.replay import Replay

if TYPE_CHECKING:
    from service.sessions.record import SessionRecord
    from service.sessions.session import Session

VARIABLE = "CHAOS_BREAK"
SERVER_BREAKS = (
    "no-index-check",
    "no-token-check",
    "no-held-answers",
    "forgetful-checkpoint",
    "no-erasure",
    "late-takeover",
)
BREAKS = (*SERVER_BREAKS, "no-replay", "forgotten-reset")
FLEET_BREAKS = ("no-fence", "trusted-memory")


def put(owner: object, name: str, replacement: object) -> None:
    """Put something else in the place of an attribute; for good."""
    setattr(owner, name, replacement)


def break_server(name: str) -> None:
    """In the process of the server."""
    from service.sessions import registry
    from service.sessions.erasure import Erasure
    from service.sessions.ledger import Ledger
    from service.sessions.session import Session

    record = Session.record
    if name == "no-index-check":
        put(Ledger, "new_steps", lambda self, first_step, steps: steps)
    elif name == "no-token-check":
        put(registry, "_check_token", lambda token_hash, opening: None)
    elif name == "no-held-answers":

        def without_answers(self: Session) -> SessionRecord:
            return replace(record(self), held=())

        put(Session, "record", without_answers)
    elif name == "forgetful-checkpoint":

        def with_initial_row(self: Session) -> SessionRecord:
            return replace(record(self), row=self._engine.initial_row(self.model))

        put(Session, "record", with_initial_row)
    elif name == "no-erasure":
        put(Erasure, "add", lambda self, key, fence: None)
    elif name == "late-takeover":

        async def later(self: registry.SessionRegistry, session: Session) -> None:
            """In the next round."""

        put(registry.SessionRegistry, "write_now", later)


def break_processes(name: str) -> None:
    """All that are started from now on, by what Python itself imports at its start."""
    folder = Path(__file__).parent
    os.environ |= {VARIABLE: name, "PYTHONPATH": f"{folder / 'broken_site'}{os.pathsep}{folder.parents[1]}"}


def break_owner(name: str) -> None:
    """In a process that shares its store with others."""
    from service.sessions.shared import SharedSessions
    from service.sessions.stores import redis_scripts, shared_sqlite

    if name == "no-fence":  # what is written is not compared with what is there
        put(shared_sqlite, "WRITE", shared_sqlite.WRITE.replace(" WHERE fence = excluded.fence", ""))
        put(redis_scripts, "WRITE", redis_scripts.WRITE.replace("if found ~= fence and", "if false and"))
    elif name == "trusted-memory":  # after a pause, what it has in memory is its own

        async def retake(self: SharedSessions, session: Session) -> bool:
            return True

        put(SharedSessions, "_retake", retake)


def break_client(name: str) -> None:
    """In the process of the client; for good."""
    if name == "no-replay":

        def nothing(self: Replay, index: int, end: int) -> list[Any]:
            return []

        put(Replay, "since", nothing)
        put(BatchReplay, "__iter__", lambda self: iter(()))
    elif name == "forgotten-reset":
        from rnnserve.session import Session as ClientSession

        point: Any = ClientSession.resume_point
        put(ClientSession, "resume_point", property(lambda self: point.fget(self)._replace(reset=False)))
        point_of = Multiplexed.resume_point
        put(Multiplexed, "resume_point", lambda self, name: point_of(self, name)._replace(reset=False))
