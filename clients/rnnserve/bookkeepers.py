"""What happens on a session, without I/O: one request at a time, or steps sent ahead of their answers."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from rnnserve.errors import RnnserveError, TimedOut
from rnnserve.exchange import CallEnded, Event, InputsEnded, NextInput, Response, Turn
from rnnserve.results import Answer
from rnnserve.session import Session
from rnnserve.tensors import Input
from rnnserve.v1.real_time_service_pb2 import StreamStepsRequest, StreamStepsResponse

_Event = Event[Input, StreamStepsResponse]
_Turn = Turn[StreamStepsRequest, Answer]
_MakeRequest = Callable[[], StreamStepsRequest]


class Exchange:
    """One request and what it is answered; without a request, the answers to what was sent before."""

    def __init__(self, session: Session, make_request: _MakeRequest | None = None, *, needs_room: bool = False) -> None:
        self._session = session
        self._needs_room = needs_room
        self._made_later: deque[_MakeRequest] = deque([make_request] if make_request else [])
        self._error: BaseException | None = None

    @property
    def failure(self) -> BaseException | None:
        """To be raised once all is done. A refusal is left in the session."""
        return self._session.failure or self._error

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer, or the room to send more."""
        return self._session.outstanding > 0 or bool(self._made_later)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.failure is not None or not self.waiting

    def begin(self) -> _Turn:
        """What to do first."""
        return self._followed(self._session.begin())

    def handle(self, event: _Event) -> _Turn:
        """What to do now."""
        match event:
            case Response(message):
                return self._followed(self._session.handle(message))
            case CallEnded(error):
                return self._followed(self._cut(error))
            case NextInput(value):
                self._take(value)
            case InputsEnded(error):
                self._end(error)
        return self._followed(Turn())

    def _take(self, x: Input) -> None:
        """The next input; one request has none."""

    def _end(self, error: BaseException | None) -> None:
        """There is no further input."""

    def _cut(self, error: RnnserveError) -> _Turn:
        if isinstance(error, TimedOut) and self._made_later and not self._session.outstanding:
            message = "the replay buffer is full, and the server made nothing durable in time; nothing was sent"
            self._error = TimedOut(message, reason=error.reason, code=error.code)
            self._session.lose()
            return Turn()
        return self._session.cut(error)

    def _followed(self, turn: _Turn) -> _Turn:
        """The same, and behind it what can be sent now."""
        if not self._made_later or self.failure is not None:
            return turn
        return replace(turn, requests=[*turn.requests, *self._requests()])

    def _requests(self) -> list[StreamStepsRequest]:
        """What waited for room. While the session is not open it is only kept, and sent by the session later."""
        requests: list[StreamStepsRequest] = []
        while self._made_later and not (self._needs_room and self._session.full):
            is_sent = self._session.ready
            request = self._made(self._made_later.popleft())
            if request is None:
                break
            requests += [request] if is_sent else []
        return requests

    def _made(self, make_request: _MakeRequest) -> StreamStepsRequest | None:
        return make_request()


class StepsAhead(Exchange):
    """Steps sent ahead of their answers. After the first failure nothing more is sent."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, needs_room=True)
        self._ended = False
        self._input_error: BaseException | None = None

    @property
    def failure(self) -> BaseException | None:
        """The first thing that failed, in the order of the steps."""
        return self._session.refusal or super().failure or (None if self._made_later else self._input_error)

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer. For room to send more it may take as long as it needs."""
        return self._session.outstanding > 0

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        all_sent = self.failure is not None or (self._ended and not self._made_later)
        return self._session.failure is not None or (all_sent and not self.waiting)

    def _take(self, x: Input) -> None:
        if not self._ended:
            self._made_later.append(lambda: self._session.steps(x))

    def _end(self, error: BaseException | None) -> None:
        self._ended = True
        self._input_error = self._input_error or error

    def _made(self, make_request: _MakeRequest) -> StreamStepsRequest | None:
        try:
            return make_request()
        except RnnserveError as error:
            self._error = error
            return None
