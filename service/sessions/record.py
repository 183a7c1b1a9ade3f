"""All that is known of a session between two of its messages: what a store keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey

Floats = NDArray[np.float32]
ANONYMOUS = ""  # the one tenant, until callers have names


class SessionKey(NamedTuple):
    """Session ids are unique within a tenant."""

    tenant: str
    session_id: str


class HeldAnswer(NamedTuple):
    """An answer that the client has not acknowledged.

    outputs (rows, outputs) about the rows' steps up to `next_step` (exclusive): all of an answer, or its last one.
    """

    first_step: int  # that the answer was about
    next_step: int
    outputs: Floats

    @property
    def first_row_step(self) -> int:
        """The index of the step that the first row is about."""
        return self.next_step - len(self.outputs)


@dataclass(frozen=True, eq=False, slots=True)
class SessionRecord:
    """A checkpoint: state, step index and unacknowledged answers of one moment. Nothing in it ever changes."""

    key: SessionKey
    model: ModelKey
    weights_sha256: str  # of the bundle that the row belongs to
    token_hash: bytes  # SHA-256 of the resume token
    next_step: int
    answered_step: int  # acknowledged: answers before it are not held
    row: Floats  # (row_size,)
    held: tuple[HeldAnswer, ...] = ()
    resets: tuple[int, ...] = ()  # indices of unacknowledged resets
    opened_s: float = 0.0  # seconds since 1970
    used_s: float = 0.0  # the last message or the end of the stream, likewise
    caller_id: bytes = b""  # of the caller who opened it last
    fence: int = 0  # another one whenever the session changes hands, in a store that several owners use
    pending: int = 0  # the last steps, as far as a look-ahead keeps their answers to come; not those before a reset
    is_new: bool = False  # nothing of it was ever written
    owner: str = ""  # whose stream has it, in such a store; "" = it is parked

    @property
    def size_bytes(self) -> int:
        """Of the arrays, which is most of it."""
        return self.row.nbytes + sum(answer.outputs.nbytes for answer in self.held)


@dataclass(frozen=True, eq=False, slots=True)
class SessionState:
    """What a session has come to, whoever it belongs to: without its id, its token and its answers."""

    model: ModelKey
    weights_sha256: str  # of the bundle that the row belongs to
    next_step: int
    row: Floats  # (row_size,)
    pending: int = 0  # as in SessionRecord

    @property
    def next_answer(self) -> int:
        """The index of the step that the next answer is about."""
        return self.next_step - self.pending


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """What is known of a stored session without reading it."""

    key: SessionKey
    model: ModelKey
    next_step: int
    opened_s: float
    used_s: float
    size_bytes: int


def summary_of(record: SessionRecord) -> SessionSummary:
    """Without its state and answers."""
    return SessionSummary(record.key, record.model, record.next_step, record.opened_s, record.used_s, record.size_bytes)
