"""Many real-time sessions on one stream, on an event loop."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from rnnserve.async_duplex import AsyncDuplex
from rnnserve.awaited import Awaited, StepOfEach
from rnnserve.batches import Arrived, BatchAnswer, Integers, rows_from
from rnnserve.errors import RnnserveError
from rnnserve.multiplexed import Multiplexed, Request
from rnnserve.results import Notice, ResumePoint
from rnnserve.statuses import not_open
from rnnserve.tensors import Input
from rnnserve.v1.real_time_service_pb2 import MultiplexStepsResponse

_MultiplexDuplex = AsyncDuplex[None, Request, MultiplexStepsResponse]


class AsyncMultiplex:
    """Many sessions of one model on one stream, for gateways: a message brings a step of each of many.

    Use it in an `async with` block, from one task at a time. What happens to one session leaves the others alone: it is
    among the `errors` of an answer.

    Where the connection or the server is lost, all sessions resume by themselves, and no step is applied or answered
    twice. After TimedOut, Unreachable or Draining that was not possible within `resume_timeout_s`: the stream is over.
    What is left of a session can be resumed by its resume point.
    """

    def __init__(
        self, multiplexed: Multiplexed, start: Callable[[AsyncIterator[Request]], Any], target: str, timeout_s: float
    ) -> None:
        self._multiplexed = multiplexed
        self._timeout_s = timeout_s
        self._connect = partial(_MultiplexDuplex, start, target, timeout_s)
        self._duplex: _MultiplexDuplex | None = None
        self._arrived: deque[Arrived] = deque()
        self._last_names: tuple[str, ...] = ()
        self._last_numbers: Integers = np.zeros(0, np.int64)

    @property
    def sessions(self) -> list[str]:
        """The ids of all that have not ended."""
        return self._multiplexed.names

    @property
    def notices(self) -> list[Notice]:
        """All notices so far: what `on_notice` was called with."""
        return self._multiplexed.announcer.notices

    def next_step(self, session: str) -> int:
        """The index of the session's next step. Steps are counted from 0, resets included. Raises KeyError."""
        return int(self._multiplexed.columns.next_step[self._known(session)])

    def durable_step(self, session: str) -> int:
        """Each step of the session before this index survives a crash of the server. Raises KeyError."""
        return int(self._multiplexed.columns.durable_step[self._known(session)])

    def resume_point(self, session: str) -> ResumePoint:
        """Where the session stands: `open(resume=[point])` goes on from there, in any process. Raises KeyError.

        Take it again after each answer that you have dealt with.
        """
        return self._multiplexed.resume_point(self._known(session))

    async def open(self, sessions: Sequence[str] = (), *, resume: Sequence[ResumePoint] = ()) -> None:
        """Begins sessions of these ids, all at once, and goes on with those of the resume points.

        `step` and `send` begin those that they don't know by themselves. Answers since a resume point come from
        `receive`. Raises the first refusal, once all are open or refused; the others stay open.
        """
        core = self._multiplexed
        numbers = [core.add(name) for name in sessions if not core.is_open(name)]
        numbers += [core.add(None, point) for point in resume]
        await self._open(numbers)
        for failure in filter(None, map(core.failure_of, numbers)):
            raise failure

    async def step(self, sessions: Sequence[str], x: Input | Sequence[str]) -> BatchAnswer:
        """Sends a step of each of these sessions, waits, and returns a row of answers for each, in their order.

        `x` is (sessions, features), or a character for each for a text model. Where a step is refused, or a session has
        ended, `errors` says why.
        """
        numbers, inputs = await self._numbers(sessions), rows_from(x, len(sessions))
        step = StepOfEach(self._multiplexed, sessions, numbers, inputs)
        await self._exchange(step)
        self._arrived += step.others
        return step.answer()

    async def send(self, sessions: Sequence[str], x: Input | Sequence[str]) -> None:
        """Sends a step of each of these sessions and waits for no answer; `receive` has them.

        Waits only where the replay buffer is full. Those of a session that has ended are dropped: `receive` has told.
        """
        core = self._multiplexed
        numbers, inputs = await self._numbers(sessions), rows_from(x, len(sessions))
        alive = core.columns.gone[numbers] == 0
        make_requests = partial(core.steps, numbers[alive], inputs[alive])
        self._arrived += await self._exchange(Awaited(core, make_requests, needs_room=True))

    async def receive(self, timeout_s: float | None = None) -> BatchAnswer | None:
        """The next answers, of whichever sessions have them, to steps that were sent ahead.

        None if there are none within the time, or if none are to come.
        """
        core = self._multiplexed
        if not self._arrived:
            until_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
            self._arrived += await self._call().poll(Awaited(core, enough=lambda: core.idle), until_s)
        if not self._arrived:
            return None
        arrived = self._arrived.popleft()
        core.hand_over(arrived)
        return core.answer(arrived)

    async def reset(self, sessions: Sequence[str]) -> None:
        """Puts these into the initial state, as if no step had been sent. Counting goes on.

        Raises the first refusal.
        """
        core = self._multiplexed
        numbers = await self._numbers(sessions)
        steps = core.columns.next_step[numbers]
        arrived = await self._exchange(
            Awaited(core, partial(core.resets, numbers), lambda: core.are_reset(numbers, steps), needs_room=True)
        )
        self._arrived += arrived
        for failure in filter(None, (part.errors.get(number) for part in arrived for number in numbers.tolist())):
            raise failure

    async def close_sessions(self, sessions: Sequence[str]) -> None:
        """Ends these. Their answers that are not received yet are dropped. Raises KeyError."""
        await self._close([self._known(name) for name in sessions], None)

    async def close(self) -> None:
        """Ends all sessions. Never fails: what can't be ended within `timeout_s` is left to the server.

        The notice "not_erased" tells of each that a crash of the server may bring back, parked.
        """
        if self._duplex is None:
            return
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        core = self._multiplexed
        core.limit_closing(self._timeout_s)
        with contextlib.suppress(RnnserveError):
            await self._close([self._known(name) for name in core.names], until_s)
        await self._duplex.finish(until_s)
        self.abort()

    async def park(self) -> None:
        """Ends the stream but not the sessions, which their resume points can resume while the server keeps them."""
        if self._duplex is not None:
            await self._duplex.finish()
            self.abort()

    def abort(self) -> None:
        """Ends the stream at once, whatever is still under way. The sessions are left as `park` leaves them."""
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

    async def _numbers(self, sessions: Sequence[str]) -> Integers:
        """Of these, all of which are open then, or have failed. Raises ValueError for one that is named twice."""
        names = tuple(sessions)
        if names == self._last_names:
            return self._last_numbers
        core = self._multiplexed
        if len(set(names)) < len(names):
            raise ValueError("a session is named twice")
        await self._open([core.add(name) for name in names if core.number(name) is None])
        self._last_names, self._last_numbers = names, np.array([core.number(name) for name in names], np.int64)
        return self._last_numbers

    def _known(self, session: str) -> int:
        number = self._multiplexed.number(session)
        if number is None:
            raise KeyError(session)
        return number

    async def _open(self, numbers: Sequence[int]) -> None:
        if numbers:
            core = self._multiplexed
            self._last_names = ()
            arrived = await self._exchange(
                Awaited(core, lambda: core.opens(numbers), lambda: not core.are_opening(numbers))
            )
            self._arrived += [part for part in arrived if not part.errors.keys() & set(numbers)]

    async def _close(self, numbers: Sequence[int], until_s: float | None) -> None:
        core = self._multiplexed
        self._last_names = ()
        await self._exchange(Awaited(core, lambda: core.closes(numbers), lambda: core.have_ended(numbers)), until_s)

    async def _exchange(self, awaited: Awaited, until_s: float | None = None) -> list[Arrived]:
        return await self._call().exchange(awaited, until_s)

    def _call(self) -> _MultiplexDuplex:
        if self._duplex is None:
            raise not_open()
        return self._duplex
