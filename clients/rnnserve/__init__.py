"""Client for rnnserve, a gRPC server for trained recurrent neural networks.

`Client` blocks, `AsyncClient` has the same names, awaited. All errors are in `rnnserve.errors`.
"""

from rnnserve.async_client import AsyncClient
from rnnserve.async_stream import AsyncStream
from rnnserve.client import Client
from rnnserve.errors import (
    DataTypeMismatch,
    Draining,
    ExecutionFailed,
    FieldInvalid,
    InputKindMismatch,
    Internal,
    InvalidArgument,
    LaneLost,
    MessageMalformed,
    MessageTooLarge,
    ModelNotFound,
    ModelNotStreamable,
    NotFinite,
    OpenMissing,
    OpenRepeated,
    QueueFull,
    RnnserveError,
    SessionExists,
    SessionLimit,
    ShapeMismatch,
    StepOutOfOrder,
    StepsMissing,
    StreamClosed,
    TimedOut,
    TooManySteps,
    TryAgain,
    UnknownSymbol,
    Unreachable,
)
from rnnserve.models import Model, Quality, Sample, TrainingData
from rnnserve.results import Answer, Notice, Prediction, TopLabel
from rnnserve.retry import RetryPolicy
from rnnserve.stream import Stream

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "DataTypeMismatch",
    "Draining",
    "ExecutionFailed",
    "FieldInvalid",
    "InputKindMismatch",
    "Internal",
    "InvalidArgument",
    "LaneLost",
    "MessageMalformed",
    "MessageTooLarge",
    "Model",
    "ModelNotFound",
    "ModelNotStreamable",
    "NotFinite",
    "Notice",
    "OpenMissing",
    "OpenRepeated",
    "Prediction",
    "Quality",
    "QueueFull",
    "RetryPolicy",
    "RnnserveError",
    "Sample",
    "SessionExists",
    "SessionLimit",
    "ShapeMismatch",
    "StepOutOfOrder",
    "StepsMissing",
    "Stream",
    "StreamClosed",
    "TimedOut",
    "TooManySteps",
    "TopLabel",
    "TrainingData",
    "TryAgain",
    "UnknownSymbol",
    "Unreachable",
]
