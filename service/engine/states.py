"""The states of a model's sessions, a row each of one array, so that a tick gathers them in one call."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Places = NDArray[np.intp]

INITIAL_ROWS = 256


class StateArray:
    """Rows (capacity, row_size); twice as many whenever all are in use."""

    def __init__(self, row_size: int) -> None:
        self.row_size = row_size
        self.rows: Floats = np.zeros((INITIAL_ROWS, row_size), np.float32)
        self._free = list(range(INITIAL_ROWS - 1, -1, -1))

    def add(self, row: Floats) -> State:
        """A state of its own, with the values of row (row_size,)."""
        if not self._free:
            in_use = len(self.rows)
            rows = np.zeros((2 * in_use, self.row_size), np.float32)  # what is not in use yet takes no memory
            rows[:in_use] = self.rows
            self.rows = rows
            self._free.extend(range(2 * in_use - 1, in_use - 1, -1))
        place = self._free.pop()
        self.rows[place] = row
        return State(self, place, self._free)


class State:
    """The state of one session: a row that is its own until nobody refers to this object any more."""

    __slots__ = ("_free", "array", "place")

    def __init__(self, array: StateArray, place: int, free: list[int]) -> None:
        self.array = array
        self.place = place
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.place)

    @property
    def row(self) -> Floats:
        """(row_size,): the values as they are now, not a copy."""
        row: Floats = self.array.rows[self.place]
        return row

    def copy(self) -> State:
        """Another state with the same values."""
        return self.array.add(self.row)
