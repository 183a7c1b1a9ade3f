"""Everything that a client can be told went wrong.

ServingError
├── Invalid              the request itself is wrong, and stays wrong however often it is sent
│   ├── FieldInvalid         OpenMissing, OpenRepeated
│   ├── InputKindMismatch    DataTypeMismatch, ShapeMismatch
│   ├── StepsMissing         TooManySteps
│   ├── MessageTooLarge      MessageMalformed
│   ├── NotFinite            UnknownSymbol
│   └── SnapshotInvalid
├── Conflict             another order of calls is needed
│   ├── StepOutOfOrder       PartOverdue
│   ├── ResumePointLost
│   └── SessionMoved         Evicted
├── NotFound
│   └── ModelNotFound        SessionNotFound
├── AlreadyExists
│   └── SessionExists
├── NotPossible          this model or this server can never do it
│   ├── ModelNotStreamable   ModelNotGenerative
│   ├── BundleMismatch       NotEnabled
│   └── BundleInvalid        ModelInUse
├── Exhausted            a limit is reached; later there may be room
│   ├── SessionLimit
│   └── QueueFull            DiskFull
├── Unavailable          this server cannot now; retry
│   ├── Draining
│   ├── StoreUnavailable
│   └── LaneLost
└── Failed               our fault
    ├── ExecutionFailed
    └── Internal

The reason on the wire is the name of the class in CAPITALS_WITH_UNDERSCORES.
"""

from __future__ import annotations

import re
from typing import Any

MAX_TEXT = 256  # characters; the transport refuses an end of call of more than 8 kB, and with it the reason


class ServingError(Exception):
    """A refusal. `field` is the path of the field that is wrong, `metadata` what a program may want to know."""

    def __init__(
        self, message: str, *, field: str | None = None, retry_after_s: float | None = None, **metadata: object
    ) -> None:
        super().__init__(message)
        self.message = _short(message)
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = {key: _short(str(value)) for key, value in metadata.items()}

    @property
    def reason(self) -> str:
        """The name of this refusal on the wire and in the metrics."""
        return _reason(type(self))


class _Within:
    """Field paths of errors raised here are relative to this one: `tensor.shape` within `steps`."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ServingError) and error.field is not None:
            error.field = f"{self._path}.{error.field}"


within = _Within  # reads as a statement; no generator, for each message passes through it


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _reason(kind: type[ServingError]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()


def reasons() -> list[str]:
    """Every reason that a client can be told."""
    return sorted(_reason(kind) for group in ServingError.__subclasses__() for kind in group.__subclasses__())


def packed(error: ServingError) -> dict[str, object]:
    """For another process; `unpacked` is its inverse."""
    return {
        "kind": type(error).__name__, "message": error.message, "field": error.field,
        "retry_after_s": error.retry_after_s, **error.metadata,
    }  # fmt: skip


def unpacked(fields: dict[str, Any]) -> ServingError:
    """What another process has packed."""
    kinds = {kind.__name__: kind for group in ServingError.__subclasses__() for kind in group.__subclasses__()}
    return kinds[fields["kind"]](**{name: value for name, value in fields.items() if name != "kind"})


class Invalid(ServingError):
    """The request itself is wrong."""


class FieldInvalid(Invalid):
    """A field is missing or outside its bounds."""


class OpenMissing(Invalid):
    """The first message of a stream is not `open`."""


class OpenRepeated(Invalid):
    """A stream was opened before."""


class InputKindMismatch(Invalid):
    """Text for a numeric model, or numbers for a text model."""


class DataTypeMismatch(Invalid):
    """The values have another type than the model reads."""


class ShapeMismatch(Invalid):
    """The values have another rank or width than the model reads, or other bytes than their shape says."""


class StepsMissing(Invalid):
    """There is no step in the message."""


class TooManySteps(Invalid):
    """There are more steps than one message or one sequence may hold."""


class NotFinite(Invalid):
    """A value is infinite, or NaN where the model takes no missing values."""


class UnknownSymbol(Invalid):
    """A character or a word is none of the model's symbols."""


class MessageTooLarge(Invalid):
    """The message has more bytes than the limit."""


class MessageMalformed(Invalid):
    """The bytes are none of the contract's message."""


class SnapshotInvalid(Invalid):
    """It cannot be imported: `why` in the metadata is damaged, unknown_key, expired or format."""


class Conflict(ServingError):
    """Another order of calls is needed."""


class StepOutOfOrder(Conflict):
    """The index is not the session's next one."""


class PartOverdue(Conflict):
    """For too long a client has not sent the next part of a sequence, or not read what it was sent about it."""


class ResumePointLost(Conflict):
    """The answers from the index on that a client asks for are no longer held."""


class SessionMoved(Conflict):
    """A newer stream of the client owns the session."""


class Evicted(Conflict):
    """A limit took the session from its stream, or ended it: `limit` in the metadata says which."""


class NotFound(ServingError):
    """There is no such thing."""


class ModelNotFound(NotFound):
    """No model of that name, or not in that version."""


class SessionNotFound(NotFound):
    """No session of that id, or no more."""


class AlreadyExists(ServingError):
    """There is such a thing already."""


class SessionExists(AlreadyExists):
    """The session id is in use; it is never taken over."""


class NotPossible(ServingError):
    """This model or this server can never do it."""


class ModelNotStreamable(NotPossible):
    """The network cannot answer before the sequence ends."""


class ModelNotGenerative(NotPossible):
    """The model is not one-to-many, so it cannot write."""


class BundleMismatch(NotPossible):
    """The session's state belongs to other weights than are served."""


class NotEnabled(NotPossible):
    """This server is set not to do it: `setting` in the metadata says by which setting."""


class BundleInvalid(NotPossible):
    """What the repository has under that name and version must not be served."""


class ModelInUse(NotPossible):
    """The model has live streams: `streams` in the metadata says how many there are at least."""


class Exhausted(ServingError):
    """A limit is reached."""


class SessionLimit(Exhausted):
    """There are as many sessions as there may be."""


class QueueFull(Exhausted):
    """There are as many sequences waiting, or generations running, as there may be."""


class DiskFull(Exhausted):
    """There is no room on the disk for a sequence that came in parts."""


class Unavailable(ServingError):
    """This server cannot now."""


class Draining(Unavailable):
    """The server is shutting down."""


class StoreUnavailable(Unavailable):
    """The session store does not answer."""


class LaneLost(Unavailable):
    """The process that computes whole sequences died."""


class Failed(ServingError):
    """Our fault."""


class ExecutionFailed(Failed):
    """The network could not compute this step or sequence."""


class Internal(Failed):
    """Something unexpected. What it was stays in the server's log."""
