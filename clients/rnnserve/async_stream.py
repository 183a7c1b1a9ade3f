"""A real-time stream on an event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

from rnnserve.async_duplex import AsyncDuplex
from rnnserve.bookkeepers import Exchange, StepsAhead
from rnnserve.errors import RnnserveError
from rnnserve.results import Answer, Notice, ResumePoint
from rnnserve.session import Durability, Session
from rnnserve.statuses import not_open
from rnnserve.tensors import Input
from rnnserve.v1.real_time_service_pb2 import StreamStepsRequest, StreamStepsResponse

_StreamDuplex = AsyncDuplex[Input, StreamStepsRequest, StreamStepsResponse]


class AsyncStream:
    """One session on the server, which keeps the state of the network between the steps.

    Use it in an `async with` block, from one task at a time. A refused step raises and changes nothing: the step may be
    sent again, corrected.

    Where the connection or the server is lost, the stream resumes by itself, and no step is applied or answered twice.
    After TimedOut, Unreachable or Draining that was not possible within `resume_timeout_s`, or the server keeps no
    sessions: the stream is over. What is left of it can be resumed by its `resume_point`; after a cancelled task, too.
    """

    def __init__(
        self,
        session: Session,
        start: Callable[[AsyncIterator[StreamStepsRequest]], Any],
        target: str,
        timeout_s: float,
    ) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._connect = partial(_StreamDuplex, start, target, timeout_s)
        self._duplex: _StreamDuplex | None = None
        self._missed: list[Answer] = []

    @property
    def session(self) -> str:
        """The session id."""
        return self._session.id

    @property
    def next_step(self) -> int:
        """The index of the next step that is sent. Steps are counted from 0, resets included."""
        return self._session.next_step

    @property
    def durability(self) -> Durability:
        """What the session survives: "none"; "process" = a lost connection; "stored" = also a crash of the server."""
        return self._session.durability

    @property
    def durable_step(self) -> int:
        """Each step before this index survives a crash of the server."""
        return self._session.durable_step

    @property
    def resume_point(self) -> ResumePoint:
        """Where the stream stands: `client.stream(model, resume=point)` goes on from there, in any process.

        Take it again after each answer that you have dealt with.
        """
        return self._session.resume_point

    @property
    def missed(self) -> list[Answer]:
        """The answers behind the resume point that the stream was opened with, as far as there were any then."""
        return self._missed

    @property
    def notices(self) -> list[Notice]:
        """All notices so far: what `on_notice` was called with."""
        return self._session.notices

    async def step(self, x: Input) -> Answer:
        """Sends one step, waits, and returns the answer about it; with a look-ahead about a step so long before it.

        The first steps of a sequence bring none then: the step of that answer is -1. `finish` brings the last ones.

        `x` is (features,), or one character or word for a text model. With several steps at once, (steps, features) or
        a longer text, the answer is about the last one.
        """
        return self._session.last(await self._exchange(lambda: self._session.steps(x), needs_room=True))

    async def steps(self, inputs: Iterable[Input] | AsyncIterable[Input], *, ahead: int = 32) -> AsyncIterator[Answer]:
        """Sends each of `inputs` as soon as it is there, up to `ahead` of them before their answers.

        Yields an answer about each step, (steps, features) and texts included; about the last step of each input where
        the stream was opened with `steps="last"`. `inputs` is read in a task of its own. An exception that it raises
        comes out here, behind the answers to what it gave before. With a look-ahead the last answers come by `finish`.
        """
        duplex = await self._settled()
        each = self._session.each(inputs)
        async with contextlib.aclosing(duplex.drive(StepsAhead(self._session), each, ahead)) as answers:
            async for answer in answers:
                self._session.hand_over(answer)
                yield answer

    async def reset(self) -> None:
        """Back to the initial state, as if no step had been sent. Counting goes on."""
        await self._exchange(self._session.reset)

    async def finish(self) -> list[Answer]:
        """The same at the end of a sequence: returns the answers about its last steps that a look-ahead has kept.

        Without a look-ahead there are none.
        """
        return await self._exchange(self._session.reset)

    async def open(self) -> None:
        """Begins the session; the `async with` block does it. Raises ModelNotFound, ModelNotStreamable, …"""
        self._duplex = self._connect()
        try:
            self._missed = await self._exchange(self._session.open)
        except BaseException:
            self.abort()
            raise

    async def close(self) -> None:
        """Ends the session. Never fails: what can't be ended within `timeout_s` is left to the server.

        What a look-ahead has kept is not wanted any more: `finish` gives it before.

        The notice "not_erased" tells where a crash of the server may bring the session back, parked: its store is down.
        """
        if self._duplex is None:
            return
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        self._session.limit_closing(self._timeout_s)
        with contextlib.suppress(RnnserveError):
            await self._exchange(self._session.close, until_s)
        await self._duplex.finish(until_s)
        self.abort()
        self._session.closed()

    async def park(self) -> None:
        """Ends the stream but not the session, which `resume_point` can resume for as long as the server keeps it."""
        if self._duplex is not None:
            await self._duplex.finish()
            self.abort()

    def abort(self) -> None:
        """Ends the stream at once, whatever is still under way. The session is left as `park` leaves it."""
        if self._duplex is not None:
            self._duplex.cancel()
            self._duplex = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.close()
        else:
            self.abort()

    async def _exchange(
        self,
        make_request: Callable[[], StreamStepsRequest],
        until_s: float | None = None,
        *,
        needs_room: bool = False,
    ) -> list[Answer]:
        """Sends one request and returns the answers in its response."""
        duplex = await self._settled(until_s)
        answers = await duplex.exchange(Exchange(self._session, make_request, needs_room=needs_room), until_s)
        self._session.settle()
        refusal = self._session.take_refusal()
        if refusal is not None:
            raise refusal
        return answers

    async def _settled(self, until_s: float | None = None) -> _StreamDuplex:
        """The call, with nothing outstanding: answers that nobody waits for any more are dropped."""
        if self._duplex is None:
            raise not_open()
        if self._session.outstanding:
            await self._duplex.exchange(Exchange(self._session), until_s)
        self._duplex.stop_feeding()
        self._session.settle()
        self._session.take_refusal()
        return self._duplex
