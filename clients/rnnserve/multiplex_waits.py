"""What a caller of a multiplexed call waits for, without I/O."""

import time
from collections.abc import Callable
from dataclasses import replace

from rnnserve.errors import RnnserveError, TimedOut
from rnnserve.exchange import CallEnded, Event, Response, TimePassed, Turn, earliest
from rnnserve.multiplexed import Multiplexed
from rnnserve.tensors import Input
from rnnserve.v1.real_time_service_pb2 import MultiplexStepsRequest, MultiplexStepsResponse

_Event = Event[Input, MultiplexStepsResponse]
_Turn = Turn[MultiplexStepsRequest, None]


class Wait:
    """Makes something as soon as it may be made, then waits until it is done, or for `timeout_s`."""

    def __init__(
        self,
        sessions: Multiplexed,
        is_done: Callable[[], bool],
        make: Callable[[], None] | None = None,
        may_make: Callable[[], bool] = lambda: True,
        *,
        timeout_s: float | None = None,
    ) -> None:
        self._sessions = sessions
        self._is_done = is_done
        self._make = make
        self._may_make = may_make
        self._until_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._is_late = False
        self._error: RnnserveError | None = None

    @property
    def failure(self) -> BaseException | None:
        """To be raised once all is done."""
        return self._sessions.failure or self._error

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer, or the room to send more."""
        return self._sessions.owes or self._make is not None

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.failure is not None or self._is_late or (self._make is None and self._is_done())

    def begin(self) -> _Turn:
        """What to do first."""
        return self._followed(self._sessions.begin())

    def handle(self, event: _Event) -> _Turn:
        """What to do now."""
        match event:
            case Response(message):
                return self._followed(self._sessions.handle(message))
            case CallEnded(error):
                return self._followed(self._cut(error))
            case TimePassed():
                self._is_late = self._until_s is not None and time.monotonic() >= self._until_s
                return self._followed(self._sessions.wake())
        return self._followed(Turn())

    def _cut(self, error: RnnserveError) -> _Turn:
        if isinstance(error, TimedOut) and self._make is not None and not self._sessions.owes:
            message = "the replay buffer is full, and the server made nothing durable in time; nothing was sent"
            self._error = TimedOut(message, reason=error.reason, code=error.code)
            self._sessions.lose()
            return Turn()
        return self._sessions.cut(error)

    def _followed(self, turn: _Turn) -> _Turn:
        """The same, and behind it what can be sent now."""
        requests = list(turn.requests)
        if self._make is not None and self.failure is None and self._may_make():
            make, self._make = self._make, None
            make()
            requests += self._sessions.outgoing()
        left_s = None if self._until_s is None else max(0.0, self._until_s - time.monotonic())
        return replace(turn, requests=requests, wake_after_s=earliest(self._sessions.wake_after_s, left_s))
