"""What a multiplexed call knows of its sessions, one array for each fact."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NEVER = 2**62
"""A step index that no session reaches."""


class SessionTable:
    """Each session has a number, which is its place in each array. A number without a session has zeros."""

    def __init__(self) -> None:
        self.next_step = _ints()  # the index of the next step that is made
        self.sent_step = _ints()  # no step from here on was ever sent
        self.answered_step = _ints()  # each answer about a step before it has come
        self.handed_step = _ints()  # each of those is with the caller; what the server is told
        self.taken_step = _ints()  # each step before it is in the state, answered about or not yet
        self.look_ahead = _ints()  # of the model
        self.durable_step = _ints()
        self.released_step = _ints()  # no step before it need be sent again
        self.kept_step = _ints()  # each step from here on can be sent again
        self.applied_step = _ints()  # what the last `opened` said: steps before it are not sent again
        self.handle = _ints()  # 0 = bound to none
        self.outstanding = _ints()  # requests that the server has not answered
        self.max_outstanding = _ints()
        self.waiting = _ints()  # requests that have not been sent yet
        self.version = _ints()  # of the model
        self.resets = _ints()  # that are not answered
        self.reset_step = _ints()  # the last reset that was made came before this step
        self.is_open = _mask()
        self.was_open = _mask()
        self.is_over = _mask()
        self.is_closing = _mask()
        self.is_refused = _mask()  # what is outstanding was sent behind a refused step, and is refused, too
        self.is_parkable = _mask()  # outlives the call
        self.is_stored = _mask()  # outlives the server
        self.is_taken_over = _mask()  # from another stream

    @property
    def capacity(self) -> int:
        """How many numbers there are."""
        return len(self.next_step)

    def grow(self, capacity: int) -> None:
        """Makes room for more sessions."""
        for name, values in vars(self).items():
            setattr(self, name, np.concatenate([values, np.zeros(capacity - len(values), values.dtype)]))

    def clear(self, number: int) -> None:
        """For the next session of this number."""
        for values in vars(self).values():
            values[number] = 0

    def may_send(self, numbers: Ints | slice = slice(None)) -> Mask:
        """Whether the next request of each may be sent now."""
        ready: Mask = self.is_open[numbers] & ~self.is_refused[numbers]
        return ready & (self.outstanding[numbers] < self.max_outstanding[numbers])

    def have_room(self, numbers: Ints) -> bool:
        """Whether one more request of each may be made."""
        return bool((self.outstanding[numbers] + self.waiting[numbers] < self.max_outstanding[numbers]).all())

    def are_settled(self, numbers: Ints, first_steps: Ints) -> bool:
        """Whether these steps were answered or refused, or their sessions are over."""
        taken = self.taken_step[numbers] > first_steps
        return bool((taken | (self.next_step[numbers] <= first_steps) | self.is_over[numbers]).all())

    def are_idle(self, numbers: Ints) -> bool:
        """Whether these are open, and all that was made for them is answered or refused; or over."""
        idle = self.is_open[numbers] & (self.outstanding[numbers] + self.waiting[numbers] == 0)
        return bool((idle | self.is_over[numbers]).all())

    def are_begun(self, numbers: Ints) -> bool:
        """Whether each of these is open or over."""
        return bool((self.is_open[numbers] | self.is_over[numbers]).all())

    def are_over(self, numbers: Ints) -> bool:
        """Whether nothing is sent for any of these any more."""
        return bool(self.is_over[numbers].all())

    def release(self, numbers: Ints) -> None:
        """After an answer, or after more became durable."""
        durable = np.where(self.is_stored[numbers], self.durable_step[numbers], NEVER)
        released = np.minimum(self.taken_step[numbers], durable)
        self.released_step[numbers] = np.maximum(self.released_step[numbers], released)

    def count_resets(self, numbers: Ints, change: int) -> None:
        """How many are not answered; one that is sent again may be answered twice."""
        self.resets[numbers] = np.maximum(self.resets[numbers] + change, 0)


def _ints() -> Ints:
    return np.zeros(0, np.int64)


def _mask() -> Mask:
    return np.zeros(0, np.bool_)
