"""The real service, which can be stopped at named points; nothing in the service knows of them.

`python -m tests.chaos.server_with_points` imports everything once and then forks a service for each line on stdin,
whose process id it prints, so that one that was killed is back at once. At the end of stdin all are killed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from service.api.live_call import LiveCall
from service.api.multiplexed_stream import MultiplexedStream
from service.api.session_stream import SessionStream
from service.app import serve
from service.engine.sequence_lane import SequenceLane
from service.engine.step_engine import Stepped
from service.sessions.registry import SessionRegistry
from service.sessions.session import Owner, Session
from service.sessions.stores.sqlite import SqliteStore
from service.sessions.stores.store import StoreError
from service.sessions.together import StepsTogether
from service.settings import read_settings
from tests.chaos import broken
from tests.chaos.plans import Point, Target

CONTROL_VARIABLE = "CHAOS_CONTROL"
GO_TIMEOUT_S = 10.0

TARGETS: dict[str, Target] = {"answer": "steps", "reset": "reset", "closed": "close"}

Action = Literal["kill", "stop", "wait"]


@dataclass(frozen=True)
class Armed:
    """What is to happen where the message of this session has come to the point."""

    session: str
    point: Point
    target: Target
    step: int
    action: Action


class Points:
    """Does what the harness asks for through a Unix socket, and tells it."""

    def __init__(self, path: str) -> None:
        self._armed: Armed | None = None
        self._go = threading.Event()
        self._written: asyncio.Event | None = None  # the checkpoint that an answer waits for
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self.tell(pid=os.getpid())
        threading.Thread(target=self._listen, name="points", daemon=True).start()

    def reach(self, point: Point, session: str, next_step: int, target: Target = "steps") -> None:
        """Everything stands still here, as it does in a process that has no more time."""
        armed = self._armed
        if not _concerns(armed, point, session, target, next_step):
            return
        assert armed is not None
        self._armed = None
        self._go.clear()
        self.tell(reached=point, session=session, next_step=next_step)
        if armed.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif armed.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            self._go.wait(GO_TIMEOUT_S)

    async def hold_answer(self, session: str, next_step: int) -> None:
        """So that a checkpoint has a step whose answer is not out yet: the answer waits for that checkpoint."""
        if _concerns(self._armed, "after_checkpoint", session, "steps", next_step):
            self._written = asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(GO_TIMEOUT_S):
                    await self._written.wait()

    def checkpoint_written(self) -> None:
        if self._written is not None:
            self._written.set()

    def _listen(self) -> None:
        for line in self._socket.makefile():
            message = json.loads(line)
            if "arm" in message:
                self._armed = Armed(**message["arm"]) if message["arm"] else None
                self.tell(armed=True)
            else:
                self._go.set()

    def tell(self, **message: object) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")


def _concerns(armed: Armed | None, point: Point, session: str, target: Target, next_step: int) -> bool:
    if armed is None or (armed.point, armed.session, armed.target) != (point, session, target):
        return False
    return next_step > armed.step if target == "steps" else next_step >= armed.step


def wrap(points: Points) -> None:
    """Put the points around the methods of the service."""
    apply, reset, close, write = Session.apply, Session.reset, SessionRegistry.close, SqliteStore.write
    keep = StepsTogether._keep

    async def apply_and_reach(self: Session, *given: Any, **named: Any) -> Any:
        before = self.next_step
        applied = await apply(self, *given, **named)
        if self.next_step > before:
            points.reach("after_apply", self.key.session_id, self.next_step)
        return applied

    def keep_and_reach(self: StepsTogether, stepped: Stepped, applied: list[int]) -> None:
        keep(self, stepped, applied)
        first = self.taken - len(stepped.outputs)
        for session in [self._sessions[first + i] for i in applied]:
            points.reach("after_apply", session.key.session_id, session.next_step)

    def reset_and_reach(self: Session, first_step: int) -> None:
        reset(self, first_step)
        points.reach("after_apply", self.key.session_id, first_step, "reset")

    async def close_and_reach(self: SessionRegistry, session: Session, owner: Owner) -> bool:
        erased: bool = await close(self, session, owner)
        points.reach("after_apply", session.key.session_id, session.next_step, "close")
        return erased

    async def write_and_reach(self: SqliteStore, records: Any) -> None:
        try:
            await write(self, records)
        except StoreError:
            points.tell(store_failed=True)
            raise
        for record in records:
            points.reach("after_checkpoint", record.key.session_id, record.next_step)
        points.checkpoint_written()

    async def no_warm_up(self: SequenceLane, folders: object) -> None:
        """No whole sequences here."""

    broken.put(Session, "apply", apply_and_reach)
    broken.put(StepsTogether, "_keep", keep_and_reach)
    broken.put(Session, "reset", reset_and_reach)
    broken.put(SessionRegistry, "close", close_and_reach)
    broken.put(SqliteStore, "write", write_and_reach)
    _write_by_way_of(_StreamContext, SessionStream, points)
    _write_by_way_of(_MultiplexedContext, MultiplexedStream, points)
    broken.put(SequenceLane, "warm_up", no_warm_up)


class _Context(ABC):
    """Of a call; answers come by their point before they are written."""

    def __init__(self, context: Any, call: Any, points: Points) -> None:
        self._context, self._call, self._points = context, call, points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @abstractmethod
    def _answered(self, kind: str, message: Any) -> list[tuple[str, int]]:
        """Of which sessions it is, and which step is the next of each."""

    async def write(self, response: Any) -> None:
        kind = response.WhichOneof("response")
        answered = self._answered(kind, getattr(response, kind))
        target: Target | None = TARGETS.get(kind)
        if target is not None:
            for session, next_step in answered:
                await self._points.hold_answer(session, next_step)
                self._points.reach("before_answer", session, next_step, target)
        await self._context.write(response)


class _StreamContext(_Context):
    """Of a stream of one session."""

    def _answered(self, kind: str, message: Any) -> list[tuple[str, int]]:
        return [(self._call.opened.session.key.session_id, message.next_step)] if kind in TARGETS else []


class _MultiplexedContext(_Context):
    """Of a multiplexed call, which forgets a handle before its close is answered."""

    def __init__(self, context: Any, call: Any, points: Points) -> None:
        super().__init__(context, call, points)
        self._sessions: dict[int, str] = {}  # by handle

    def _answered(self, kind: str, message: Any) -> list[tuple[str, int]]:
        match kind:
            case "opened" if handle := self._call._handles.get(message.handle):
                self._sessions[message.handle] = handle.session.key.session_id
            case "answer":
                steps = zip(message.handles, message.first_steps, strict=True)
                return [(self._sessions[handle], step + 1) for handle, step in steps]
            case "reset":
                return [(self._sessions[message.handle], message.next_step)]
            case "closed":
                return [(self._sessions[message.handle], message.closed.next_step)]
        return []


def _write_by_way_of(context_type: type[_Context], call_type: type[LiveCall], points: Points) -> None:
    init: Any = call_type.__init__

    def init_with_points(self: LiveCall, context: Any, *given: Any) -> None:
        init(self, context_type(context, self, points), *given)

    broken.put(call_type, "__init__", init_with_points)


def run_service() -> int:
    """What `python -m service` does, with the points."""
    import uvloop

    settings = read_settings([])
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    broken.break_server(os.environ.get(broken.VARIABLE, ""))
    wrap(Points(os.environ[CONTROL_VARIABLE]))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings))
    return 0


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead leave nothing behind
    children: list[int] = []
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 1)
            code = 1
            try:
                code = run_service()
            except BaseException:
                logging.exception("the service ended")
            os._exit(code)
        children = [child for child in children if os.path.exists(f"/proc/{child}")] + [pid]
        print(pid, flush=True)
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
