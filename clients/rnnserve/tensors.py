"""Arrays and texts on their way to the wire and back."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rnnserve.errors import DataTypeMismatch, NotFinite, ShapeMismatch
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

Array = npt.NDArray[np.float32]
"""An array of float32."""

Input = npt.ArrayLike | str
"""What a model reads: an array or anything that NumPy makes one of, or a text."""

_A_SEQUENCE_IS = "a sequence is"
_WIRE_TYPE = np.dtype("<f4")
_KINDS = {"U": "text", "S": "bytes", "c": "complex numbers", "M": "dates", "m": "spans of time"}


def steps_tensor(x: npt.ArrayLike) -> Tensor:
    """(features,) or (steps, features) -> a tensor of (steps, features)."""
    values = _numbers(x)
    return _tensor(values[np.newaxis] if values.ndim == 1 else values, "a step is (features,), several are")


def sequence_array(x: npt.ArrayLike) -> npt.NDArray[np.generic]:
    """(steps, features) as it is, without a copy where it is an array."""
    return _matrix(_numbers(x), _A_SEQUENCE_IS)


def sequence_tensor(x: npt.ArrayLike, first_step: int | None = None) -> Tensor:
    """(steps, features) -> a tensor of the same shape; of a part, `first_step` is the index of its first step."""
    return _tensor(_numbers(x), _A_SEQUENCE_IS, first_step)


def rows_array(x: Input | Sequence[str], sessions: int) -> npt.NDArray[np.float32] | npt.NDArray[np.object_]:
    """A step of each of several sessions -> a copy: (sessions, features), or (sessions,) of texts.

    What does not fit float32 becomes infinite, which the server refuses row by row.
    """
    if isinstance(x, str) or (isinstance(x, list | tuple) and x and isinstance(x[0], str)):
        return _texts([str(text) for text in x], sessions)
    values = _numbers(x)
    if values.ndim != 2 or len(values) != sessions:
        raise _no_step_of_each(f"({sessions}, features)", f"this has the shape {values.shape}")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def array_from(tensor: Tensor) -> Array:
    """A tensor -> an array of its own of the same shape; (0, 0) for a tensor that was never set."""
    if not tensor.shape:
        return np.zeros((0, 0), np.float32)
    return np.frombuffer(tensor.data, _WIRE_TYPE).reshape(tuple(tensor.shape)).astype(np.float32)


def _numbers(x: npt.ArrayLike) -> npt.NDArray[np.generic]:
    try:
        values = np.asarray(x)
    except ValueError as error:  # rows of different lengths
        raise ShapeMismatch(f"not an array: {error}", reason="SHAPE_MISMATCH", code="INVALID_ARGUMENT") from error
    if values.dtype.kind not in "fiub":
        message = f"inputs must be numbers, not {_described(values)}"
        raise DataTypeMismatch(message, reason="DATA_TYPE_MISMATCH", code="INVALID_ARGUMENT")
    return values


def _described(values: npt.NDArray[np.generic]) -> str:
    if values.dtype.kind != "O":
        return _KINDS.get(values.dtype.kind, values.dtype.name)
    strange = [value for value in values.flat if not isinstance(value, int | float)]
    return f"objects such as {strange[0]!r:.40}" if strange else "Python objects"


def _texts(texts: Sequence[str], sessions: int) -> npt.NDArray[np.object_]:
    if len(texts) != sessions:
        raise _no_step_of_each(f"one of {sessions} characters or words", f"these are {list(texts)!r:.80}")
    return np.array(texts, np.object_)


def _no_step_of_each(expected: str, found: str) -> ShapeMismatch:
    message = f"a step of each session is {expected}, but {found}"
    return ShapeMismatch(message, reason="SHAPE_MISMATCH", code="INVALID_ARGUMENT")


def _matrix(values: npt.NDArray[np.generic], expected: str) -> npt.NDArray[np.generic]:
    if values.ndim != 2:
        message = f"{expected} (steps, features), but this has the shape {values.shape}"
        raise ShapeMismatch(message, reason="SHAPE_MISMATCH", code="INVALID_ARGUMENT")
    return values


def _tensor(values: npt.NDArray[np.generic], expected: str, first_step: int | None = None) -> Tensor:
    _matrix(values, expected)
    try:
        with np.errstate(over="raise"):
            data = values.astype(_WIRE_TYPE).tobytes()
    except FloatingPointError:
        raise _too_large(values, first_step) from None
    return Tensor(data_type=DATA_TYPE_FLOAT32, shape=values.shape, data=data)


def _too_large(values: npt.NDArray[np.generic], first_step: int | None) -> NotFinite:
    with np.errstate(over="ignore"):
        step, feature = np.argwhere(np.isfinite(values) & np.isinf(values.astype(_WIRE_TYPE)))[0].tolist()
    number, of = (step, "message") if first_step is None else (first_step + step, "sequence")
    return NotFinite(
        f"step {number} of the {of} has {values[step, feature]:g} as feature {feature}, which does not fit float32",
        reason="NOT_FINITE",
        code="INVALID_ARGUMENT",
        metadata={"step": str(number), "feature": str(feature)},
    )
