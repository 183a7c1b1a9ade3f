"""Which handle a session has on a multiplexed call."""

from collections.abc import Iterable

import numpy as np

from rnnserve.session_table import Ints, SessionTable

_FIRST_CAPACITY = 64


class Handles:
    """A handle is larger than those before on the same call; 0 is none."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._last = 0
        self._number_of = np.full(_FIRST_CAPACITY, -1)

    def begin_call(self) -> None:
        """Handles begin anew."""
        self._last = 0
        self._number_of[:] = -1

    def bind(self, number: int) -> int:
        """A new handle for a session."""
        self._last += 1
        if self._last >= len(self._number_of):
            self._number_of = np.concatenate([self._number_of, np.full(len(self._number_of), -1)])
        self._number_of[self._last] = number
        self._table.handle[number] = self._last
        return self._last

    def unbind(self, numbers: Ints) -> None:
        """These have none any more."""
        self._number_of[self._table.handle[numbers]] = -1
        self._table.handle[numbers] = 0

    def numbers(self, handles: Iterable[int]) -> Ints:
        """Whose they are; -1 = nobody's any more."""
        numbers: Ints = self._number_of[ints(handles)]
        return numbers


def ints(values: Iterable[int]) -> Ints:
    """Of a repeated field."""
    return np.array(list(values), np.int64)
