"""Everything that can go wrong, as one tree.

RnnserveError
├── InvalidArgument       what was sent is wrong; sending it again will not help
│   ├── OpenMissing  OpenRepeated  FieldInvalid  InputKindMismatch  DataTypeMismatch  ShapeMismatch
│   ├── StepsMissing  TooManySteps  NotFinite  UnknownSymbol  MessageTooLarge  MessageMalformed
│   └── SnapshotInvalid   .metadata["why"] is "damaged", "unknown_key", "expired" or "format"
├── ModelNotFound
├── ModelNotStreamable    the network must see the whole sequence; use `predict`
├── ModelNotGenerative    the model is not one-to-many, so it cannot write
├── SessionExists         the session id is in use
├── SessionNotFound       there is no such session to resume, or its time is over
├── SessionMoved          another stream has taken the session over
├── Evicted               the server gave the session up; .metadata["resumable"] says whether it can be resumed
├── ResumePointLost       the session is there, but the answers or the steps in between no longer are
├── BundleMismatch        the session was computed by another build of the model
├── BundleInvalid         what the server's repository has of the model must not be served
├── ModelInUse            the model has live streams; .metadata["streams"] says how many at least
├── NotEnabled            the server is set not to do it; .metadata["setting"] names the setting
├── StepOutOfOrder        .metadata["expected_step"] is the index of the next step
├── PartOverdue           for too long no part of a sequence was sent, or nothing read that came about it
├── TryAgain              nothing is wrong with the request; .retry_after_s says when to come back
│   ├── SessionLimit  QueueFull  DiskFull  Draining  LaneLost  StoreUnavailable
│   └── Unreachable       no server answered
├── TimedOut              no answer within `timeout_s`
├── ExecutionFailed       the network failed on this input
├── Internal              a fault of the server
└── StreamClosed          a stream was used before it was open or after it had ended
"""

import re
from collections.abc import Mapping


class RnnserveError(Exception):
    """The root. Raised itself for a reason that this version of the client does not know.

    Attributes:
        reason: the reason in capitals, such as "MODEL_NOT_FOUND"; empty if none was given.
        code: the name of the gRPC status code, such as "NOT_FOUND".
        metadata: facts that belong to the reason.
        retry_after_s: how long to wait before another try; None = not said.
        field: the path of the field that was refused; None = not about a field.
        index: in bulk work, which sequence this is about, counted from 0.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.code = code
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.field = field
        self.index: int | None = None


class InvalidArgument(RnnserveError):
    """What was sent is wrong."""


class OpenMissing(InvalidArgument):
    """The first message of a stream was not an open."""


class OpenRepeated(InvalidArgument):
    """A stream was opened twice."""


class FieldInvalid(InvalidArgument):
    """A field has a value that it can't have: see `.field`."""


class InputKindMismatch(InvalidArgument):
    """Text was sent to a numeric model, or numbers to a text model."""


class DataTypeMismatch(InvalidArgument):
    """The values are not numbers."""


class ShapeMismatch(InvalidArgument):
    """The array has the wrong rank or the wrong number of features."""


class StepsMissing(InvalidArgument):
    """There is no step in it."""


class TooManySteps(InvalidArgument):
    """There are more steps in one message than the server takes."""


class NotFinite(InvalidArgument):
    """A value is infinite, or NaN where the model refuses missing values."""


class UnknownSymbol(InvalidArgument):
    """The text has a character or a word that the model does not know."""


class MessageTooLarge(InvalidArgument):
    """The message has more bytes than the server takes."""


class MessageMalformed(InvalidArgument):
    """The server cannot decode the message: its contract is another one."""


class SnapshotInvalid(InvalidArgument):
    """The snapshot was changed, or has expired, or the server does not know its key or its format."""


class ModelNotFound(RnnserveError):
    """The server has no such model, or not that version of it."""


class ModelNotStreamable(RnnserveError):
    """The network must see the whole sequence before it answers."""


class ModelNotGenerative(RnnserveError):
    """The model is not one-to-many, so it cannot write."""


class SessionExists(RnnserveError):
    """The session id is in use."""


class SessionNotFound(RnnserveError):
    """There is no such session to resume, or it was kept long enough without a stream."""


class SessionMoved(RnnserveError):
    """Another stream has taken the session over."""


class Evicted(RnnserveError):
    """The server gave the session up, because it met a limit."""


class ResumePointLost(RnnserveError):
    """The session is there, but the answers or the steps that are missing in between no longer are."""


class BundleMismatch(RnnserveError):
    """The session was computed by another build of the model, which the server no longer has."""


class BundleInvalid(RnnserveError):
    """What the server's repository has of the model must not be served."""


class ModelInUse(RnnserveError):
    """The model has live streams."""


class NotEnabled(RnnserveError):
    """The server is set not to do it."""


class StepOutOfOrder(RnnserveError):
    """The session expects another step."""


class PartOverdue(RnnserveError):
    """For too long we have not sent the next part of a sequence, or not read what came about it."""


class TryAgain(RnnserveError):
    """Nothing is wrong with the request, but the server can't serve it now."""


class SessionLimit(TryAgain):
    """The server has as many sessions as it may have."""


class QueueFull(TryAgain):
    """The server has as much waiting work as it may have."""


class DiskFull(TryAgain):
    """The server's disk has no room for so long a sequence, now."""


class Draining(TryAgain):
    """The server is shutting down."""


class LaneLost(TryAgain):
    """The process that computes whole sequences was lost and is being restarted."""


class StoreUnavailable(TryAgain):
    """The server can't write down the session now, so that it would not survive a crash."""


class Unreachable(TryAgain):
    """No server answered, or the connection broke."""


class TimedOut(RnnserveError):
    """No answer came in time."""


class ExecutionFailed(RnnserveError):
    """The network failed on this input."""


class Internal(RnnserveError):
    """A fault of the server."""


class StreamClosed(RnnserveError):
    """The stream was used before it was open or after it had ended."""


def reason_of(error_class: type[RnnserveError]) -> str:
    """The reason that a class is named after: ModelNotFound -> "MODEL_NOT_FOUND"."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", error_class.__name__).upper()


BY_REASON: dict[str, type[RnnserveError]] = {
    reason_of(error_class): error_class
    for error_class in (
        OpenMissing,
        OpenRepeated,
        FieldInvalid,
        InputKindMismatch,
        DataTypeMismatch,
        ShapeMismatch,
        StepsMissing,
        TooManySteps,
        NotFinite,
        UnknownSymbol,
        MessageTooLarge,
        MessageMalformed,
        SnapshotInvalid,
        ModelNotFound,
        ModelNotStreamable,
        ModelNotGenerative,
        SessionExists,
        SessionNotFound,
        SessionMoved,
        Evicted,
        ResumePointLost,
        BundleMismatch,
        BundleInvalid,
        ModelInUse,
        NotEnabled,
        StepOutOfOrder,
        PartOverdue,
        SessionLimit,
        QueueFull,
        DiskFull,
        Draining,
        LaneLost,
        StoreUnavailable,
        ExecutionFailed,
        Internal,
    )
}
