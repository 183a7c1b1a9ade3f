"""A real-time stream on an event loop."""

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

from rnnserve.async_duplex import AsyncDuplex
from rnnserve.errors import RnnserveError
from rnnserve.exchange import Response
from rnnserve.results import Answer, Notice
from rnnserve.session import Session, StepsAhead
from rnnserve.statuses import not_open
from rnnserve.tensors import Input
from rnnserve.v1.real_time_service_pb2 import StreamStepsRequest, StreamStepsResponse

_StreamDuplex = AsyncDuplex[Input, StreamStepsRequest, StreamStepsResponse]


class AsyncStream:
    """One session on the server, which keeps the state of the network between the steps.

    Use it in an `async with` block, from one task at a time. A refused step raises and changes nothing: the step may be
    sent again, corrected. After TimedOut, Unreachable, Draining or a cancelled task the session is gone.
    """

    def __init__(
        self,
        session: Session,
        start: Callable[[AsyncIterator[StreamStepsRequest]], Any],
        target: str,
        timeout_s: float,
    ) -> None:
        self._session = session
        self._connect = partial(_StreamDuplex, start, target, timeout_s)
        self._duplex: _StreamDuplex | None = None

    @property
    def session(self) -> str:
        """The session id."""
        return self._session.id

    @property
    def next_step(self) -> int:
        """The index of the next step that is sent. Steps are counted from 0, resets included."""
        return self._session.next_step

    @property
    def notices(self) -> list[Notice]:
        """What the server has said by itself so far: that it is about to shut down."""
        return self._session.notices

    async def step(self, x: Input) -> Answer:
        """Sends one step, waits, and returns the answer about it.

        `x` is (features,), or one character for a text model. With several steps at once, (steps, features) or a longer
        text, the answer is about the last one.
        """
        return self._session.last(await self._exchange(lambda: self._session.steps(x)))

    async def steps(self, inputs: Iterable[Input] | AsyncIterable[Input], *, ahead: int = 32) -> AsyncIterator[Answer]:
        """Sends each of `inputs` as soon as it is there, up to `ahead` of them before their answers.

        Yields an answer about each step, (steps, features) and texts included; about the last step of each input where
        the stream was opened with `steps="last"`. `inputs` is read in a task of its own. An exception that it raises
        comes out here, behind the answers to what it gave before.
        """
        duplex = await self._settled()
        async with contextlib.aclosing(duplex.drive(StepsAhead(self._session), inputs, ahead)) as answers:
            async for answer in answers:
                yield answer

    async def reset(self) -> None:
        """Back to the initial state, as if no step had been sent. Counting goes on."""
        await self._exchange(self._session.reset)

    async def open(self) -> None:
        """Begins the session; the `async with` block does it. Raises ModelNotFound, ModelNotStreamable, …"""
        self._duplex = self._connect()
        try:
            await self._exchange(self._session.open)
        except BaseException:
            self.abort()
            raise

    async def close(self) -> None:
        """Ends the session. Never fails: a session whose server is gone has ended, too."""
        if self._duplex is None:
            return
        with contextlib.suppress(RnnserveError):
            await self._exchange(self._session.close)
        await self._duplex.finish()
        self._duplex = None

    def abort(self) -> None:
        """Ends the session at once, whatever is still under way."""
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

    async def _exchange(self, make_request: Callable[[], StreamStepsRequest]) -> list[Answer]:
        """Sends one request and returns the answers in its response."""
        duplex = await self._settled()
        duplex.send(make_request())
        answers = await self._receive_outstanding(duplex)
        refusal = self._session.take_refusal()
        if refusal is not None:
            raise refusal
        return answers

    async def _settled(self) -> _StreamDuplex:
        """The call, with nothing outstanding: answers that nobody waits for any more are dropped."""
        if self._duplex is None:
            raise not_open()
        self._duplex.stop_feeding()
        await self._receive_outstanding(self._duplex)
        self._session.take_refusal()
        return self._duplex

    async def _receive_outstanding(self, duplex: _StreamDuplex) -> list[Answer]:
        answers: list[Answer] = []
        while self._session.outstanding:
            event = await duplex.receive()
            if isinstance(event, Response):
                answers += self._session.receive(event.message)
        return answers
