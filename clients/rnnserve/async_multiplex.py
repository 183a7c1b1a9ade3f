"""Many real-time sessions on one call, on an event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from rnnserve.async_duplex import AsyncDuplex
from rnnserve.errors import RnnserveError
from rnnserve.multiplex_waits import Wait
from rnnserve.multiplexed import Multiplexed
from rnnserve.results import BatchAnswer, Notice, ResumePoint
from rnnserve.session import Durability
from rnnserve.session_table import Ints
from rnnserve.statuses import not_open
from rnnserve.tensors import Input, rows_array
from rnnserve.v1.real_time_service_pb2 import MultiplexStepsRequest, MultiplexStepsResponse

_MultiplexDuplex = AsyncDuplex[Input, MultiplexStepsRequest, MultiplexStepsResponse]


class AsyncMultiplex:
    """Many sessions of one model on one call, which takes a step of each of them in a message.

    Use it in an `async with` block, from one task at a time. Sessions are named by their ids and begin with their first
    step. What happens to one of them, such as a refused step, is in `errors` of the next answer; the others go on.

    Where the connection or the server is lost, all sessions are resumed, and no step is applied or answered twice.
    After TimedOut, Unreachable or Draining that was not possible within `resume_timeout_s`: the call is over. What is
    left of each session can be resumed by its `resume_point`; after a cancelled task, too.
    """

    def __init__(
        self,
        sessions: Multiplexed,
        start: Callable[[AsyncIterator[MultiplexStepsRequest]], Any],
        target: str,
        timeout_s: float,
    ) -> None:
        self._sessions = sessions
        self._timeout_s = timeout_s
        self._connect = partial(_MultiplexDuplex, start, target, timeout_s)
        self._duplex: _MultiplexDuplex | None = None

    @property
    def sessions(self) -> list[str]:
        """The ids of the sessions that are not over."""
        return self._sessions.names

    @property
    def notices(self) -> list[Notice]:
        """All notices so far: what `on_notice` was called with."""
        return self._sessions.notices

    def next_step(self, session: str) -> int:
        """The index of the next step that is sent. Counted from 0, resets included. Raises SessionNotFound."""
        return int(self._sessions.table.next_step[self._sessions.number(session)])

    def durable_step(self, session: str) -> int:
        """Each step before this index survives a crash of the server. Raises SessionNotFound."""
        return int(self._sessions.table.durable_step[self._sessions.number(session)])

    def durability(self, session: str) -> Durability:
        """What it survives: "none"; "process" = a lost connection; "stored" = also a crash. Raises SessionNotFound."""
        return self._sessions.durability(session)

    def resume_point(self, session: str) -> ResumePoint:
        """Where a session stands: `open(resume=[point])` or `client.stream(model, resume=point)` goes on from there.

        Take it again after each answer that you have dealt with. It knows of a reset once the answers to what was sent
        before that are received. Raises SessionNotFound.
        """
        return self._sessions.resume_point(session)

    async def open(self, sessions: Sequence[str] = (), *, resume: Sequence[ResumePoint] = ()) -> None:
        """Begins sessions, all at once, and goes on with those of resume points.

        `step` and `send` begin sessions by themselves; here you learn of errors before the first step. Raises the first
        error, such as SessionExists or SessionLimit; the other sessions are open then. A name whose session is over
        begins anew. What a resumed session has missed comes by `receive`, and `next_step` says which step comes next.
        """
        points = list(resume)
        self._sessions.forget(self._sessions.known([*sessions, *(point.session for point in points)]))
        for point in points:
            self._sessions.resume(point)
        numbers = self._sessions.numbers([*sessions, *(point.session for point in points)])
        await self._wait(Wait(self._sessions, partial(self._sessions.table.are_begun, numbers)))
        self._raise_error(numbers)

    async def step(self, sessions: Sequence[str], x: Input | Sequence[str]) -> BatchAnswer:
        """Sends a step of each session, waits for all of them, and returns the answers in the same order.

        `x` is (sessions, features), or for a text model a list of one character or word for each session. A row that is
        refused costs the others nothing. Raises ShapeMismatch, DataTypeMismatch, FieldInvalid; then nothing was sent.

        With a look-ahead the answers are about steps so long before these; where there is none yet, the step of the row
        is -1. `finish` brings the last ones.
        """
        make, numbers = self._steps(sessions, x)
        first_steps = self._sessions.table.next_step[numbers]
        is_done = partial(self._sessions.table.are_settled, numbers, first_steps)
        await self._wait(Wait(self._sessions, is_done, make, partial(self._may_send, numbers)))
        return self._sessions.take_steps(sessions, numbers, first_steps)

    async def send(self, sessions: Sequence[str], x: Input | Sequence[str]) -> None:
        """Sends a step of each session, and waits only for room: for what a session may have outstanding.

        The answers come by `receive`; until then they are kept here. Behind a refused step nothing more is sent for a
        session before `receive` has told of it. Raises as `step`.
        """
        make, numbers = self._steps(sessions, x)
        await self._wait(Wait(self._sessions, lambda: True, make, partial(self._may_send, numbers)))

    async def receive(self, timeout_s: float | None = None) -> BatchAnswer | None:
        """All answers that have come and that nobody waited for; a session may have several rows, in order.

        Waits for the first one at most for `timeout_s`, not counted what it takes to resume; None = for as long as one
        is owed. Returns None if nothing has come. A session in `errors` has one more row.
        """
        sessions = self._sessions
        if timeout_s is None:
            await self._wait(Wait(sessions, lambda: sessions.has_news or not sessions.pending))
        else:
            await self._wait(Wait(sessions, lambda: sessions.has_news, timeout_s=timeout_s))
        await self._wait(Wait(sessions, lambda: False, timeout_s=0.0))
        return sessions.take()

    async def reset(self, sessions: Sequence[str]) -> None:
        """Back to the initial state, behind what was sent. Counting goes on. Raises the first error.

        The answers about the last steps that a look-ahead has kept come by `receive`.
        """
        numbers = self._sessions.numbers(sessions)
        is_done = partial(self._sessions.table.are_idle, numbers)
        await self._wait(Wait(self._sessions, is_done, partial(self._sessions.reset, numbers)))
        self._raise_error(numbers)

    async def finish(self, sessions: Sequence[str]) -> BatchAnswer:
        """The same at the end of the sequences: returns the answers about the last steps that a look-ahead has kept.

        And, before them, what had come of these sessions already; all in order, several rows for each.
        """
        await self.reset(sessions)
        return self._sessions.take_all_of(sessions)

    async def close_sessions(self, sessions: Sequence[str]) -> None:
        """Ends sessions and forgets their names, once what was sent of them is answered; unknown names are passed over.

        What a look-ahead has kept is not wanted any more: `finish` gives it before.

        The notice "not_erased" tells where a crash of the server may bring one back, parked: its store is down.
        """
        await self._close(self._sessions.known(sessions))

    async def close(self) -> None:
        """Ends all sessions. Never fails: what can't be ended within `timeout_s` is left to the server."""
        if self._duplex is None:
            return
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        self._sessions.limit_closing(self._timeout_s)
        with contextlib.suppress(RnnserveError):
            await self._close(self._sessions.known(self._sessions.names), until_s)
        await self._duplex.finish(until_s)
        self.abort()
        self._sessions.closed()

    async def park(self) -> None:
        """Ends the call but no session; each `resume_point` can be resumed for as long as the server keeps it."""
        if self._duplex is not None:
            await self._duplex.finish()
            self.abort()

    def abort(self) -> None:
        """Ends the call at once, whatever is still under way. The sessions are left as `park` leaves them."""
        if self._duplex is not None:
            self._duplex.cancel()
            self._duplex = None

    async def __aenter__(self) -> Self:
        self._duplex = self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        else:
            self.abort()

    def _steps(self, sessions: Sequence[str], x: Input | Sequence[str]) -> tuple[Callable[[], None], Ints]:
        """What makes the steps, and the numbers of the sessions."""
        inputs = rows_array(x, len(sessions))
        numbers = self._sessions.numbers(sessions)
        return partial(self._sessions.steps, numbers, inputs), numbers

    def _may_send(self, numbers: Ints) -> bool:
        return not self._sessions.full and self._sessions.table.have_room(numbers)

    async def _close(self, numbers: Ints, until_s: float | None = None) -> None:
        """Behind everything else."""
        sessions = self._sessions
        await self._wait(Wait(sessions, partial(sessions.table.are_idle, numbers)), until_s)
        await self._wait(
            Wait(sessions, partial(sessions.table.are_over, numbers), partial(sessions.close, numbers)), until_s
        )
        sessions.forget(numbers)

    def _raise_error(self, numbers: Ints) -> None:
        error = self._sessions.take_error(numbers)
        if error is not None:
            raise error

    async def _wait(self, wait: Wait, until_s: float | None = None) -> None:
        if self._duplex is None:
            raise not_open()
        await self._duplex.exchange(wait, until_s)
