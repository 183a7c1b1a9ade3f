"""Arrays and texts on their way to the wire and back."""

import numpy as np
import numpy.typing as npt

from rnnserve.errors import DataTypeMismatch, NotFinite, ShapeMismatch
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

Array = npt.NDArray[np.float32]
"""An array of float32."""

Input = npt.ArrayLike | str
"""What a model reads: an array or anything that NumPy makes one of, or a text."""

_WIRE_TYPE = np.dtype("<f4")
_KINDS = {"U": "text", "S": "bytes", "c": "complex numbers", "M": "dates", "m": "spans of time"}


def steps_tensor(x: npt.ArrayLike) -> Tensor:
    """(features,) or (steps, features) -> a tensor of (steps, features)."""
    values = _numbers(x)
    return tensor_from(
        _fitting(
            values[np.newaxis] if values.ndim == 1 else values, "a step is (features,), several are (steps, features)"
        )
    )


def sequence_tensor(x: npt.ArrayLike) -> Tensor:
    """(steps, features) -> a tensor of the same shape."""
    return tensor_from(_fitting(_numbers(x), "a sequence is (steps, features)"))


def batch_rows(x: npt.ArrayLike) -> Array:
    """(sessions, features) -> an array of its own of the same shape, as it travels."""
    return _fitting(_numbers(x), "steps of several sessions are (sessions, features)")


def tensor_from(values: Array) -> Tensor:
    """Values as they travel -> a tensor of the same shape."""
    return Tensor(data_type=DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())


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


def _fitting(values: npt.NDArray[np.generic], expected: str) -> Array:
    """The same as little-endian float32."""
    if values.ndim != 2:
        message = f"{expected}, but this has the shape {values.shape}"
        raise ShapeMismatch(message, reason="SHAPE_MISMATCH", code="INVALID_ARGUMENT")
    try:
        with np.errstate(over="raise"):
            return values.astype(_WIRE_TYPE)
    except FloatingPointError:
        raise _too_large(values) from None


def _too_large(values: npt.NDArray[np.generic]) -> NotFinite:
    with np.errstate(over="ignore"):
        step, feature = np.argwhere(np.isfinite(values) & np.isinf(values.astype(_WIRE_TYPE)))[0].tolist()
    return NotFinite(
        f"step {step} of the message has {values[step, feature]:g} as feature {feature}, which does not fit float32",
        reason="NOT_FINITE",
        code="INVALID_ARGUMENT",
        metadata={"step": str(step), "feature": str(feature)},
    )
