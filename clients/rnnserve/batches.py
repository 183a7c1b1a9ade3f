"""Requests of many sessions at a time: those that wait to be sent, and those that are kept to send them again."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from rnnserve.replay import REPLAY_BUFFER_BYTES, WhenReplayFull, check_replay
from rnnserve.session_table import NEVER, Ints, Mask, SessionTable
from rnnserve.texts import size_bytes

Inputs = npt.NDArray[np.float32] | npt.NDArray[np.object_]
"""(sessions, features), or (sessions,) of texts, a character or a word each."""


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """One request of each of several sessions."""

    kind: Literal["steps", "reset", "close"]
    numbers: Ints
    """Whose; each at most once."""
    first_steps: Ints
    """The index of each one's next step."""
    inputs: Inputs

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def size_bytes(self) -> int:
        """What it counts in a buffer."""
        texts_bytes = size_bytes(self.inputs) if self.has_texts else 0
        return texts_bytes + self.inputs.nbytes + self.numbers.nbytes + self.first_steps.nbytes

    @property
    def has_texts(self) -> bool:
        """Whether its inputs are texts."""
        return self.inputs.dtype == np.object_

    @property
    def row_bytes(self) -> int:
        """How many bytes the input of one of its rows has in a message, at most."""
        if self.has_texts:
            return size_bytes([max(self.inputs, key=len)])
        return self.inputs.nbytes // len(self)

    def rows(self, rows: slice | Mask) -> "Batch":
        """A part of it."""
        return Batch(self.kind, self.numbers[rows], self.first_steps[rows], self.inputs[rows])

    def where(self, mask: Mask) -> "Batch":
        """A part of it, or all of it without a copy."""
        return self if mask.all() else self.rows(mask)


def bare(kind: Literal["reset", "close"], numbers: Ints, first_steps: Ints) -> Batch:
    """Requests that have no inputs."""
    return Batch(kind, numbers, first_steps, np.zeros((len(numbers), 0), np.float32))


class BatchReplay:
    """The batches that the server may still ask for, in order.

    Those are the ones without an answer and, of sessions that survive a crash, those behind the last checkpoint.
    """

    def __init__(
        self, table: SessionTable, limit_bytes: int = REPLAY_BUFFER_BYTES, when_full: WhenReplayFull = "wait"
    ) -> None:
        check_replay(limit_bytes, when_full)
        self._table = table
        self._limit_bytes = limit_bytes
        self._drops = when_full == "drop"
        self._batches: deque[Batch] = deque()
        self._size_bytes = 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    @property
    def full(self) -> bool:
        """Whether nothing more should be sent for now."""
        return self._size_bytes > self._limit_bytes

    def add(self, batch: Batch) -> None:
        """The newest."""
        if len(batch):
            self._batches.append(batch)
            self._size_bytes += batch.size_bytes

    def prune(self) -> None:
        """Drops what was answered and is durable: whole batches, single rows only where there is no room."""
        while self._batches and self._is_released(self._batches[0]).all():
            self._forget(self._batches.popleft())
        if self.full:
            self.sweep()
        if self.full and self._drops:
            self._drop_answered()

    def sweep(self) -> None:
        """Drops each row that was answered and is durable."""
        self._keep(lambda batch: ~self._is_released(batch))

    def drop_refused(self, from_step: Ints) -> None:
        """Drops the requests of each session from such a step on; they are among the newest."""
        table = self._table
        numbers = np.flatnonzero(from_step < NEVER)
        counts = table.next_step[numbers] - from_step[numbers] + table.resets[numbers] + table.is_closing[numbers]
        left = int(counts.sum())
        newer: list[Batch] = []
        while left > 0 and self._batches:
            batch = self._batches.pop()
            self._size_bytes -= batch.size_bytes
            kept = batch.where(~is_refused(batch, table, from_step))
            left -= len(batch) - len(kept)
            newer.append(kept)
        for batch in reversed(newer):
            self.add(batch)

    def _is_released(self, batch: Batch) -> Mask:
        released: Mask = batch.first_steps < self._table.released_step[batch.numbers]
        return released

    def _drop_answered(self) -> None:
        """The oldest steps; a reset costs next to nothing and stays."""
        for _ in range(len(self._batches)):
            batch = self._batches.popleft()
            if self.full and batch.kind == "steps":
                batch = self._reduced(batch, batch.first_steps >= self._table.taken_step[batch.numbers])
            if len(batch):
                self._batches.append(batch)

    def _keep(self, keeps: Callable[[Batch], Mask]) -> None:
        kept = (self._reduced(batch, keeps(batch)) for batch in self._batches)
        self._batches = deque(batch for batch in kept if len(batch))

    def _reduced(self, batch: Batch, mask: Mask) -> Batch:
        if mask.all():
            return batch
        self._forget(batch.rows(~mask))
        return batch.rows(mask)

    def _forget(self, batch: Batch) -> None:
        self._size_bytes -= batch.size_bytes
        if batch.kind == "steps":
            self._table.kept_step[batch.numbers] = batch.first_steps + 1


class Backlog:
    """The batches that wait until their sessions may send them, in order."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._batches: deque[Batch] = deque()

    def __bool__(self) -> bool:
        return bool(self._batches)

    def add(self, batch: Batch) -> None:
        """Behind the others."""
        if len(batch):
            self._batches.append(batch)
            self._table.waiting[batch.numbers] += 1

    def clear(self) -> None:
        """Nothing waits any more."""
        self._batches.clear()
        self._table.waiting[:] = 0

    def keep(self, keeps: Callable[[Batch], Mask]) -> None:
        """Drops the other rows."""
        batches, self._batches = self._batches, deque()
        for batch in batches:
            mask = keeps(batch)
            self._table.waiting[batch.numbers] -= 1
            self.add(batch.where(mask))

    def take(self) -> list[Batch]:
        """What may be sent now, which then is outstanding."""
        table, taken, left = self._table, list[Batch](), list[Batch]()
        ready = table.may_send() & (table.waiting > 0)
        while self._batches and ready.any():
            batch = self._batches.popleft()
            mask = ready[batch.numbers]
            if mask.any():
                taken.append(self._lacked(batch.where(mask)))
                ready[batch.numbers] = table.may_send(batch.numbers) & (table.waiting[batch.numbers] > 0)
                batch = batch.rows(~mask)
            left.append(batch)
        self._batches.extendleft(batch for batch in reversed(left) if len(batch))
        return [batch for batch in taken if len(batch)]

    def _lacked(self, batch: Batch) -> Batch:
        """Without what the server has applied already."""
        table = self._table
        table.waiting[batch.numbers] -= 1
        lacked = batch.first_steps >= table.applied_step[batch.numbers]
        if batch.kind == "reset":
            table.count_resets(batch.numbers[~lacked], -1)
        batch = batch.where(lacked)
        table.outstanding[batch.numbers] += 1
        return batch


def is_refused(batch: Batch, table: SessionTable, from_step: Ints) -> Mask:
    """Which of these go with what was refused: `from_step` says of each session from which step on.

    A reset that was answered is done, and stays.
    """
    mask: Mask = batch.first_steps >= from_step[batch.numbers]
    return mask & (table.resets[batch.numbers] > 0) if batch.kind == "reset" else mask
