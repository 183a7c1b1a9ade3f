"""Inputs sent ahead of their answers: what the bookkeeping and the two transports have in common.

A transport hands each event to a bookkeeper and does what the turn that comes back says. Bookkeepers do no I/O.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from rnnserve.errors import RnnserveError

_X = TypeVar("_X")
_A = TypeVar("_A")
_Q_co = TypeVar("_Q_co", covariant=True)
_R_co = TypeVar("_R_co", covariant=True)


@dataclass(frozen=True)
class NextInput(Generic[_X]):
    """The caller's iterable gave something to send."""

    value: _X


@dataclass(frozen=True)
class InputsEnded:
    """The caller's iterable has ended, or failed with `error`."""

    error: BaseException | None = None


@dataclass(frozen=True)
class Response(Generic[_A]):
    """The server sent a message."""

    message: _A


@dataclass(frozen=True)
class CallEnded:
    """The server or the connection ended the call, or no response came in time. The transport has dropped the call."""

    error: RnnserveError


@dataclass(frozen=True)
class TimePassed:
    """Nothing has happened for as long as the last turn said."""


Event = NextInput[_X] | InputsEnded | Response[_A] | CallEnded | TimePassed


@dataclass(frozen=True)
class Turn(Generic[_Q_co, _R_co]):
    """What one event leads to."""

    requests: Sequence[_Q_co] = ()
    """To send now."""
    results: Sequence[_R_co] = ()
    """To give to the caller now."""
    places: int = 0
    """How many more inputs may be taken."""
    reconnect_after_s: float | None = None
    """To begin a new call after this pause, and only then send the requests."""
    wake_after_s: float | None = None
    """To say TimePassed if nothing happens for so long."""
    streams: Sequence[Iterator[_Q_co]] = ()
    """To send behind the requests, each message when the server has room for it. They are not to raise."""


def earliest(*times_s: float | None) -> float | None:
    """None = never."""
    return min((time_s for time_s in times_s if time_s is not None), default=None)


class Bookkeeper(Protocol[_X, _Q_co, _A, _R_co]):
    """Knows what was sent and what is still to come."""

    def begin(self) -> Turn[_Q_co, _R_co]:
        """What to do first."""

    @property
    def failure(self) -> BaseException | None:
        """To be raised once all is done."""

    @property
    def waiting(self) -> bool:
        """Whether the server owes something, so that the wait for it is limited."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""

    def handle(self, event: Event[_X, _A]) -> Turn[_Q_co, _R_co]:
        """What to do now."""
