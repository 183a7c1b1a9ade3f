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
    """Counts steps from 0 and holds the answers that the client has not acknowledged.

    With a look-ahead of k the step of index t brings the answer about t - k, if that is of the same sequence: those
    about the last k steps are pending until further ones, or the end of the sequence, bring them. All about answers,
    what is held of them and what is acknowledged, is in the indices of the steps that they are about.
    """

    __slots__ = (
        "_held", "_held_bytes", "_look_ahead", "_max_held_bytes", "_resets", "answered_step", "next_step", "pending",
    )  # fmt: skip

    def __init__(
        self,
        next_step: int = 0,
        answered_step: int = 0,
        held: Iterable[HeldAnswer] = (),
        resets: Iterable[int] = (),
        *,
        max_held_bytes: int,
        look_ahead: int = 0,
        pending: int = 0,
    ) -> None:
        """`pending`: how many of the last steps have no answer yet, `look_ahead` at most."""
        self.next_step = next_step
        self.pending = pending
        self._look_ahead = look_ahead
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
    def next_answer(self) -> int:
        """The index of the step that the next answer is about."""
        return self.next_step - self.pending

    @property
    def held_from(self) -> int:
        """Every answer from this index on is held."""
        return self._held[0][FIRST_STEP] if self._held else self.next_answer

    def acknowledge(self, answered_step: int) -> None:
        """The client has every answer before the index, or wants none. After a crash it may be ahead of us."""
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
        self.answered_step = min(answered_step, self.next_answer)
        self._drop_acknowledged()
        return [_from_step(answer, answered_step) for answer in self.held if answer.next_step > answered_step]

    def new_steps(self, first_step: int, steps: int) -> int:
        """How many of so many steps from that index on were not applied before. Raises StepOutOfOrder for a gap."""
        if first_step > self.next_step:
            raise self._out_of_order(first_step)
        return max(0, first_step + steps - self.next_step)

    def applied(self, outputs: Floats, *, last_only: bool = False) -> Floats:
        """The next steps were applied, and the network gave these: (steps, outputs). The answer: (rows, outputs).

        With `last_only` it is about the last step only that it could be about.
        """
        first_step = self.next_step - self.pending
        self.next_step += len(outputs)
        if self._look_ahead:
            pending = self.next_step - first_step
            self.pending = min(pending, self._look_ahead)
            outputs = outputs[len(outputs) - (pending - self.pending) :]
        return self._brought(first_step, outputs, last_only)

    def ended(self, outputs: Floats, *, last_only: bool = False) -> Floats:
        """The sequence is over, and its padding gave these: (look_ahead, outputs). The answer about what is pending."""
        first_step, pending, self.pending = self.next_answer, self.pending, 0
        return self._brought(first_step, outputs[len(outputs) - pending :], last_only)

    def _brought(self, first_step: int, answer: Floats, last_only: bool) -> Floats:
        """Hold what is about the steps from that index on."""
        next_answer = first_step + len(answer)
        if last_only:
            answer = answer[-1:]
        if first_step < next_answer > self.answered_step:
            self._held.append((first_step, next_answer, len(answer), answer.tobytes()))
            self._held_bytes += answer.nbytes + ANSWER_OVERHEAD_BYTES
            self._drop_surplus()
        return answer

    def applied_one(self, output: bytes) -> None:
        """The next step was applied, and this is the answer: the bytes of a row of float32. Not with a look-ahead."""
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
            self.pending = 0
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

    def answer_again(self, first_step: int, next_step: int) -> tuple[int, list[Floats]]:
        """What these steps, which were applied before, have brought, as far as it is held: rows without a gap.

        And the index of the step behind the last one that they are about.
        """
        if self.pending < self._look_ahead and first_step >= self.next_answer:  # their sequence has no answer yet
            return self.next_answer, []
        until = max(0, next_step - self._look_ahead)
        return until, self._rows_about(first_step - self._look_ahead, until)

    def answer_since(self, first_step: int) -> list[Floats]:
        """The same of all steps from that index on, as far as the next answer will follow without a gap."""
        if self.pending < self._look_ahead:
            return []
        return self._rows_about(first_step - self._look_ahead, self.next_answer)

    def _rows_about(self, first_step: int, next_step: int) -> list[Floats]:
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
