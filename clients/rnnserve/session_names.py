"""Which number a session of a multiplexed call has."""

from collections.abc import Callable, Iterable, Sequence, Set

import numpy as np

from rnnserve.errors import SessionNotFound
from rnnserve.session import checked_session_id
from rnnserve.session_table import Ints, SessionTable

_MAX_GROUPS = 64
_FIRST_CAPACITY = 64


class SessionNames:
    """The names, tokens and numbers of sessions.

    A number is used again once its session is forgotten and `used`, which is asked for, has it no more.
    """

    def __init__(self, table: SessionTable, used: Callable[[], Set[int]]) -> None:
        self._table = table
        self._used = used
        self._names: list[str] = []  # by number
        self._tokens: list[bytes] = []
        self._numbers: dict[str, int] = {}
        self._groups: dict[tuple[str, ...], Ints] = {}
        self._free: list[int] = []
        self._retired: list[int] = []

    def __contains__(self, name: str) -> bool:
        return name in self._numbers

    @property
    def numbers(self) -> Ints:
        """Of all sessions, in the order in which they began."""
        return np.array(list(self._numbers.values()), np.int64)

    def number(self, name: str) -> int:
        """Raises SessionNotFound."""
        if name in self._numbers:
            return self._numbers[name]
        raise SessionNotFound(f"{name!r} is not open on this call", reason="SESSION_NOT_FOUND", code="NOT_FOUND")

    def known(self, names: Iterable[str]) -> Ints:
        """The numbers of those that have one."""
        return np.array([self._numbers[name] for name in dict.fromkeys(names) if name in self._numbers], np.int64)

    def name(self, number: int) -> str:
        """Also of a session that was forgotten, for as long as its number is used."""
        return self._names[number]

    def token(self, number: int) -> bytes:
        """Its resume token."""
        return self._tokens[number]

    def group(self, names: Sequence[str], begin: Callable[[str], int]) -> Ints:
        """The numbers of sessions; `begin` gives one to a new name. Raises TypeError, ValueError, FieldInvalid."""
        if isinstance(names, str):
            raise TypeError("sessions is a list of names; for one write [name]")
        group = tuple(names)
        numbers = self._groups.get(group)
        return self._new_group(group, begin) if numbers is None else numbers

    def add(self, name: str, token: bytes) -> int:
        """A new session."""
        if not self._free:
            self._make_free()
        number = self._free.pop()
        self._table.clear(number)
        self._names[number], self._tokens[number] = name, token
        self._numbers[name] = number
        return number

    def forget(self, numbers: Iterable[int]) -> None:
        """Their names may begin anew."""
        for number in numbers:
            del self._numbers[self._names[number]]
            self._retired.append(number)
        self._groups.clear()

    def _new_group(self, group: tuple[str, ...], begin: Callable[[str], int]) -> Ints:
        if len(set(group)) < len(group):
            raise ValueError("a session is named twice")
        for name in group:
            checked_session_id(name)
        numbers = np.array([self._numbers[name] if name in self._numbers else begin(name) for name in group], np.int64)
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        self._groups[group] = numbers
        return numbers

    def _make_free(self) -> None:
        capacity = self._table.capacity
        if len(self._retired) > capacity // 2:
            used = self._used()
            self._free = [number for number in self._retired if number not in used]
            self._retired = [number for number in self._retired if number in used]
        if not self._free:
            larger = max(_FIRST_CAPACITY, 2 * capacity)
            self._table.grow(larger)
            self._names += [""] * (larger - capacity)
            self._tokens += [b""] * (larger - capacity)
            self._free = list(range(larger - 1, capacity - 1, -1))
