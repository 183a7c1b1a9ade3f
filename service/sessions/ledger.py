"""The exactly-once rules of one session: which steps were applied, and which answers are still owed.

No I/O, no clock, and no state of the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from service.errors import ResumePointLost, StepOutOfOrder
from service.sessions.record import Floats, HeldAnswer

ANSWER_OVERHEAD_BYTES = 200  # of one held answer, besides its outputs

_Held = tuple[int, int, int, bytes]
"""A held answer as nothing but a tuple, since every step of every session makes one: of which step to before which one,
how many rows, and the rows themselves."""
FIRST_STEP: Final = 0
NEXT_STEP: Final = 1
OUTPUTS: Final = 3


class Ledger:
    """Counts steps from 0 and holds the answers that the client has not acknowledged."""

    __slots__ = ("_held", "_held_bytes", "_max_held_bytes", "_resets", "answered_step", "next_step")

    def __init__(
        self,
        next_step: int = 0,
        answered_step: int = 0,
        held: Iterable[HeldAnswer] = (),
        resets: Iterable[int] = (),
        *,
        max_held_bytes: int,
    ) -> None:
        self.next_step = next_step
        self.answered_step = answered_step
        self._max_held_bytes = max_held_bytes
        self._held = list(map(_held, held))  # mostly one or none, for which a deque would be large
        self._held_bytes = sum(map(_size_bytes, self._held))
        self._resets = list(resets)

    @property
    def held(self) -> tuple[HeldAnswer, ...]:
        return tuple(map(_answer, self._held))

    @property
    def resets(self) -> tuple[int, ...]:
        return tuple(self._resets)

    @property
    def held_outputs_bytes(self) -> int:
        """Of the answers that are held."""
        return self._held_bytes - ANSWER_OVERHEAD_BYTES * len(self._held)

    @property
    def held_from(self) -> int:
        """Every answer from this index on is held."""
        return self._held[0][FIRST_STEP] if self._held else self.next_step

    def acknowledge(self, answered_step: int) -> None:
        """The client has every answer before the index. After a crash it may be ahead of us."""
        if answered_step > self.answered_step:
            self.answered_step = answered_step
            self._drop_acknowledged()

    def _drop_acknowledged(self) -> None:
        held, answered_step = self._held, self.answered_step
        while held and held[0][NEXT_STEP] <= answered_step:
            self._held_bytes -= len(held.pop(0)[OUTPUTS]) + ANSWER_OVERHEAD_BYTES
        while self._resets and self._resets[0] < self.answered_step:
            del self._resets[0]

    def resume(self, answered_step: int) -> list[HeldAnswer]:
        """The client goes on behind the answer of that index; those that it has missed. Raises ResumePointLost.

        A client that is ahead of us after a crash may have nothing left to send again, and go on from our index.
        """
        if answered_step < self.held_from:
            raise ResumePointLost(
                f"the answers before step {self.held_from} are no longer held",
                field="answered_step",
                expected_step=self.held_from,
            )
        self.answered_step = min(answered_step, self.next_step)
        self._drop_acknowledged()
        return [_from_step(answer, answered_step) for answer in self.held if answer.next_step > answered_step]

    def new_steps(self, first_step: int, steps: int) -> int:
        """How many of so many steps from that index on were not applied before. Raises StepOutOfOrder for a gap."""
        if first_step > self.next_step:
            raise self._out_of_order(first_step)
        return max(0, first_step + steps - self.next_step)

    def applied(self, first_step: int, next_step: int, outputs: Floats) -> None:
        """The steps up to the index (exclusive) were applied; outputs (rows, outputs) is the answer."""
        self.next_step = next_step
        if next_step > self.answered_step:
            self._held.append((first_step, next_step, len(outputs), outputs.tobytes()))
            self._held_bytes += outputs.nbytes + ANSWER_OVERHEAD_BYTES
            self._drop_surplus()

    def applied_one(self, output: bytes) -> None:
        """The next step was applied, and this is the answer: the bytes of a row of float32."""
        step = self.next_step
        self.next_step = next_step = step + 1
        if next_step > self.answered_step:
            self._held.append((step, next_step, 1, output))
            self._held_bytes += len(output) + ANSWER_OVERHEAD_BYTES
            if self._held_bytes > self._max_held_bytes:
                self._drop_surplus()

    def _drop_surplus(self) -> None:
        while self._held_bytes > self._max_held_bytes:
            self._held_bytes -= _size_bytes(self._held.pop(0))
        while self._resets and self._resets[0] < self.held_from:
            del self._resets[0]

    def reset(self, first_step: int) -> bool:
        """Whether a reset before that step is new, or a repetition. Raises StepOutOfOrder."""
        if first_step == self.next_step:
            if not self._resets or self._resets[-1] != first_step:
                self._resets.append(first_step)
            return True
        if first_step in self._resets:
            return False
        raise self._out_of_order(first_step)

    def expect(self, first_step: int) -> None:
        """Raises StepOutOfOrder if it is not the next one."""
        if first_step != self.next_step:
            raise self._out_of_order(first_step)

    def rows_about(self, first_step: int, next_step: int) -> list[Floats]:
        """Rows about the last of these steps, without a gap, as far as they are held."""
        rows: list[Floats] = []
        for answer in map(_answer, reversed(self._held)):
            if answer.first_row_step >= next_step:
                continue
            if answer.next_step < next_step or next_step <= first_step:
                break
            part = _from_step(answer, first_step).outputs[: next_step - answer.next_step or None]
            rows.insert(0, part)
            next_step -= len(part)
        return rows

    def _out_of_order(self, first_step: int) -> StepOutOfOrder:
        return StepOutOfOrder(
            f"the next step of the session is {self.next_step}, not {first_step}",
            field="first_step",
            expected_step=self.next_step,
        )


def _from_step(answer: HeldAnswer, step: int) -> HeldAnswer:
    skip = max(0, step - answer.first_row_step)
    return HeldAnswer(max(answer.first_step, step), answer.next_step, answer.outputs[skip:])


def _held(answer: HeldAnswer) -> _Held:
    return answer.first_step, answer.next_step, len(answer.outputs), answer.outputs.tobytes()


def _answer(held: _Held) -> HeldAnswer:
    first_step, next_step, rows, outputs = held
    return HeldAnswer(first_step, next_step, np.frombuffer(outputs, np.float32).reshape(rows, -1 if rows else 0))


def _size_bytes(answer: _Held) -> int:
    return len(answer[OUTPUTS]) + ANSWER_OVERHEAD_BYTES


def joined(rows: list[Floats]) -> Floats:
    """(rows, outputs) of several such; (0, 0) of none."""
    if len(rows) == 1:
        return rows[0]
    return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)
