"""One stream's state: applies each step index once, whatever is sent again."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.states import State
from service.engine.step_engine import StepEngine
from service.errors import ExecutionFailed, ServingError, SessionMoved
from service.sessions.ledger import Ledger, joined
from service.sessions.record import Floats, HeldAnswer, SessionRecord

NO_PADDING: NDArray[np.generic] = np.empty(0, np.float32)


class StepMetrics(Protocol):
    """Where applied steps are counted."""

    def steps(self, model: ModelKey, applied: int) -> None:
        """So many steps entered the state of a session of the model."""
        ...


class Owner(Protocol):
    """The stream that has a session; one at a time."""

    def lose(self, error: ServingError) -> None:
        """The session is taken away: end, and say why."""
        ...

    def became_durable(self) -> None:
        """All that was applied is durable by now."""
        ...


@dataclass(slots=True)
class AppliedSteps:
    """All steps before `next_step` were applied; why that one failed, if it did.

    outputs (rows, outputs) about the steps before `next_answer`, which a look-ahead keeps behind `next_step`.
    """

    next_step: int
    next_answer: int
    outputs: Floats
    failure: ExecutionFailed | None = None
    waited_s: float = 0.0  # for ticks
    computed_s: float = 0.0  # that these took

    @property
    def first_step(self) -> int:
        """The index of the step that the first row is about."""
        return self.next_answer - len(self.outputs)


class Session:
    """State, ledger and owner of one session. Only its owner may change it."""

    __slots__ = (
        "_clock", "_engine", "_metrics", "_owner_name", "_padding", "_state", "_weights_sha256", "caller_id",
        "durable_step", "ended", "fence", "key", "ledger", "model", "opened_s", "owner", "stored", "token_hash",
        "used_s",
    )  # fmt: skip

    def __init__(
        self,
        record: SessionRecord,
        engine: StepEngine,
        metrics: StepMetrics,
        *,
        max_held_bytes: int,
        clock: Callable[[], float],
        owner_name: str = "",
        padding: NDArray[np.generic] = NO_PADDING,
    ) -> None:
        """`owner_name` is that of this process, in a store that several processes use.

        padding (look_ahead, features) or (look_ahead,) is what the network reads behind the end of a sequence.
        """
        self.key = record.key
        self.model = record.model
        self.opened_s = record.opened_s
        self.used_s = record.used_s
        self.durable_step = 0
        self.owner: Owner | None = None
        self.ended = False
        self._weights_sha256 = record.weights_sha256
        self.token_hash = record.token_hash
        self.caller_id = record.caller_id
        self.fence = record.fence
        self.stored = False  # what the store has under the key is of this session
        self._state = engine.states(record.model).add(record.row)
        self._padding = padding
        self.ledger = Ledger(
            record.next_step,
            record.answered_step,
            record.held,
            record.resets,
            max_held_bytes=max_held_bytes,
            look_ahead=len(padding),
            pending=record.pending,
        )
        self._engine = engine
        self._metrics = metrics
        self._clock = clock
        self._owner_name = owner_name

    @property
    def next_step(self) -> int:
        """The index that the next step must have."""
        return self.ledger.next_step

    @property
    def answered_step(self) -> int:
        """Every answer before the step of that index is acknowledged."""
        return self.ledger.answered_step

    @property
    def look_ahead(self) -> int:
        """Of its model."""
        return len(self._padding)

    @property
    def resumable(self) -> bool:
        """Whether it has a token, and so may outlive its stream."""
        return bool(self.token_hash)

    @property
    def state(self) -> State:
        """After the step before `next_step`."""
        return self._state

    @property
    def size_bytes(self) -> int:
        """Of its state and the answers that it holds."""
        return self._state.row.nbytes + self.ledger.held_outputs_bytes

    def record(self) -> SessionRecord:
        """A checkpoint of this moment."""
        return SessionRecord(
            key=self.key,
            model=self.model,
            weights_sha256=self._weights_sha256,
            token_hash=self.token_hash,
            next_step=self.ledger.next_step,
            answered_step=self.ledger.answered_step,
            row=self._state.row.copy(),
            held=self.ledger.held,
            resets=self.ledger.resets,
            opened_s=self.opened_s,
            used_s=self.used_s,
            caller_id=self.caller_id,
            fence=self.fence,
            pending=self.ledger.pending,
            is_new=not self.stored,
            owner="" if self.owner is None else self._owner_name,
        )

    def take(self, owner: Owner, answered_step: int, caller_id: bytes = b"") -> list[HeldAnswer]:
        """Give the session to a stream; the answers that it has missed. Raises ResumePointLost, and nothing changes.

        The stream that had it loses it: what it has under way is dropped.
        """
        missed = self.ledger.resume(answered_step)
        self.caller_id = caller_id
        before, self.owner = self.owner, owner
        if before is not None:
            before.lose(SessionMoved("a newer stream has taken this session over"))
        self.used_s = self._clock()
        return missed

    def acknowledge(self, answered_step: int) -> None:
        """A message says that the client has every answer before the step of that index."""
        self.ledger.acknowledge(answered_step)
        self.used_s = self._clock()

    async def apply(
        self, owner: Owner, first_step: int, inputs: NDArray[np.generic], *, last_only: bool = False
    ) -> AppliedSteps:
        """Apply (steps, features) or (steps,) of validated inputs, as far as they are new.

        Those applied before are answered from what is held. Raises StepOutOfOrder and SessionMoved. Whatever fails
        or is cancelled, the state is that after `next_step - 1`.
        """
        ledger, next_step = self.ledger, first_step + len(inputs)
        new = ledger.new_steps(first_step, len(inputs))
        if not new:
            until, rows = ledger.answer_again(first_step, next_step)
            return AppliedSteps(next_step, until, joined(rows[-1:] if last_only else rows))
        before = ledger.next_step
        result = await self._engine.step(self.model, inputs[len(inputs) - new :], self._state, self.key.tenant)
        self._check_owner(owner)
        known = ledger.answer_since(first_step) if first_step < before and not last_only else []
        if len(result.outputs):
            self._state.row[:] = result.row
            known.append(ledger.applied(result.outputs, last_only=last_only))
            self._metrics.steps(self.model, len(result.outputs))
        self.used_s = self._clock()
        until, outputs = ledger.next_step - ledger.pending, joined(known)
        return AppliedSteps(ledger.next_step, until, outputs, result.failure, result.waited_s, result.computed_s)

    def _check_owner(self, owner: Owner) -> None:
        if self.owner is not owner or self.ended:
            raise SessionMoved("the session was taken away while the steps were under way")

    def applied_before(self, step: int) -> AppliedSteps:
        """The answer that a step has brought, as far as it is held. Raises StepOutOfOrder if it was not applied yet."""
        if self.ledger.new_steps(step, 1):
            self.ledger.expect(step)
        until, rows = self.ledger.answer_again(step, step + 1)
        return AppliedSteps(step + 1, until, joined(rows))

    def ends_with_answers(self, first_step: int) -> bool:
        """Whether the sequence, if it ends before the step of that index, still brings answers that are wanted."""
        ledger = self.ledger
        return ledger.pending > 0 and first_step == ledger.next_step > ledger.answered_step

    async def end_sequence(self, owner: Owner, *, last_only: bool = False) -> AppliedSteps:
        """What a look-ahead has kept to come: the answers about the last steps, and the state is the initial one again.

        Raises SessionMoved, and ExecutionFailed; then nothing has changed.
        """
        result = await self._engine.step(self.model, self._padding, self._state, self.key.tenant)
        self._check_owner(owner)
        if result.failure is not None:
            raise result.failure
        answer = self.ledger.ended(result.outputs, last_only=last_only)
        self._state.row[:] = 0
        return AppliedSteps(self.ledger.next_step, self.ledger.next_answer, answer)

    def reset(self, first_step: int) -> None:
        """Back to the initial state before the step of that index, once. Raises StepOutOfOrder.

        What `end_sequence` has not brought until then is never answered.
        """
        if self.ledger.reset(first_step):
            self._state.row[:] = 0
        self.used_s = self._clock()

    def expect(self, first_step: int) -> None:
        """Raises StepOutOfOrder if it is not the next one."""
        self.ledger.expect(first_step)

    @property
    def all_answered(self) -> bool:
        """Whether every answer that there is is acknowledged."""
        return self.ledger.answered_step >= self.ledger.next_answer


def hash_of(token: bytes) -> bytes:
    """What is kept of a resume token; nothing of none."""
    return hashlib.sha256(token).digest() if token else b""


def admits(token_hash: bytes, token: bytes) -> bool:
    """Whether the token is the one that was hashed."""
    return bool(token_hash) and hmac.compare_digest(token_hash, hash_of(token))
