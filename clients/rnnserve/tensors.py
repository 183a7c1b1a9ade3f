"""Arrays and texts on their way to the wire and back."""

import numpy as np
import numpy.typing as npt

from rnnserve.errors import DataTypeMismatch, ShapeMismatch
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

Array = npt.NDArray[np.float32]
"""An array of float32."""

Input = npt.ArrayLike | str
"""What a model reads: an array or anything that NumPy makes one of, or a text."""

_WIRE_TYPE = np.dtype("<f4")


def steps_tensor(x: npt.ArrayLike) -> Tensor:
    """(features,) or (steps, features) -> a tensor of (steps, features)."""
    values = _numbers(x)
    return _tensor(values[np.newaxis] if values.ndim == 1 else values, "a step is (features,), several are")


def sequence_tensor(x: npt.ArrayLike) -> Tensor:
    """(steps, features) -> a tensor of the same shape."""
    return _tensor(_numbers(x), "a sequence is")


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
        message = f"inputs must be numbers, not {values.dtype.name}"
        raise DataTypeMismatch(message, reason="DATA_TYPE_MISMATCH", code="INVALID_ARGUMENT")
    return values


def _tensor(values: npt.NDArray[np.generic], expected: str) -> Tensor:
    if values.ndim != 2:
        message = f"{expected} (steps, features), but this has the shape {values.shape}"
        raise ShapeMismatch(message, reason="SHAPE_MISMATCH", code="INVALID_ARGUMENT")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which the server refuses by name
        data = values.astype(_WIRE_TYPE).tobytes()
    return Tensor(data_type=DATA_TYPE_FLOAT32, shape=values.shape, data=data)
