"""Between the messages of the contract and the arrays of the engine, for one model."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from models.manifest import FeatureInput, Manifest, TextInput, UnknownSymbolError
from rnnserve.v1 import prediction_pb2, real_time_service_pb2, sequence_service_pb2, tensor_pb2
from service.errors import (
    DataTypeMismatch,
    FieldInvalid,
    InputKindMismatch,
    NotFinite,
    ShapeMismatch,
    StepsMissing,
    TooManySteps,
    UnknownSymbol,
)

WIRE_FLOAT32 = np.dtype("<f4")

Floats = NDArray[np.float32]
Input = real_time_service_pb2.Steps | sequence_service_pb2.Sequence
"""Each has a oneof `input` of `tensor` and `text`."""


def decode(message: Input, manifest: Manifest, *, max_steps: int) -> NDArray[np.generic]:
    """The steps of a message: (steps, features) float32 or (steps,) int64.

    Raises InputKindMismatch, DataTypeMismatch, ShapeMismatch, StepsMissing, TooManySteps, NotFinite, UnknownSymbol;
    their field paths begin inside the message.
    """
    kind = message.WhichOneof("input")
    if kind is None:
        raise StepsMissing("there is neither tensor nor text", field="input")
    if isinstance(manifest.input, TextInput):
        if kind != "text":
            raise InputKindMismatch(f"model {manifest.name!r} reads text, not a tensor", field="tensor")
        _check_count(len(message.text), max_steps, "text")
        return _decode_text(message.text, manifest.input)
    if kind != "tensor":
        raise InputKindMismatch(f"model {manifest.name!r} reads a tensor, not text", field="text")
    return _decode_features(message.tensor, manifest.input, max_steps)


def _decode_text(text: str, spec: TextInput) -> NDArray[np.int64]:
    try:
        return spec.encode(text)
    except UnknownSymbolError as error:
        raise UnknownSymbol(str(error), field="text", symbol=error.symbol, place=error.place) from None


def _decode_features(tensor: tensor_pb2.Tensor, spec: FeatureInput, max_steps: int) -> Floats:
    if tensor.data_type != tensor_pb2.DATA_TYPE_FLOAT32:
        raise DataTypeMismatch("the type of the values must be DATA_TYPE_FLOAT32", field="tensor.data_type")
    shape, width = tuple(tensor.shape), len(spec.feature_names)
    if len(shape) != 2 or shape[1] != width:
        raise ShapeMismatch(f"the shape must be (steps, {width}), not {shape}", field="tensor.shape", features=width)
    _check_count(shape[0], max_steps, "tensor.shape")
    if len(tensor.data) != WIRE_FLOAT32.itemsize * math.prod(shape):
        raise ShapeMismatch(
            f"a tensor of shape {shape} has {WIRE_FLOAT32.itemsize * math.prod(shape)} bytes, not {len(tensor.data)}",
            field="tensor.data",
        )
    values = np.frombuffer(tensor.data, WIRE_FLOAT32).reshape(shape).astype(np.float32)
    _check_finite(values, spec)
    return values


def _check_count(steps: int, max_steps: int, field: str) -> None:
    if steps < 1:
        raise StepsMissing("there must be at least one step", field=field)
    if steps > max_steps:
        raise TooManySteps(f"{steps} steps are more than {max_steps}", field=field, limit=max_steps)


def _check_finite(values: Floats, spec: FeatureInput) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    wrong = ~finite if spec.missing_values == "refuse" else np.isinf(values)
    if wrong.any():
        step, feature = np.argwhere(wrong)[0].tolist()
        raise NotFinite(
            f"step {step} of the message has {values[step, feature]} as {spec.feature_names[feature]!r}",
            field="tensor.data", step=step, feature=feature,
        )  # fmt: skip


def check_options(options: prediction_pb2.OutputOptions, manifest: Manifest) -> None:
    """Raises FieldInvalid if the model cannot give what is asked for."""
    labels = len(manifest.output.labels)
    if options.probabilities and not labels:
        raise FieldInvalid(f"model {manifest.name!r} has no labels", field="options.probabilities")
    if options.top_k > labels:
        raise FieldInvalid(
            f"model {manifest.name!r} has {labels} labels, fewer than {options.top_k}",
            field="options.top_k",
            limit=labels,
        )
    if options.steps not in prediction_pb2.StepSelection.values():
        raise FieldInvalid(f"there is no step selection {options.steps}", field="options.steps")


def encode(outputs: Floats, manifest: Manifest, options: prediction_pb2.OutputOptions) -> prediction_pb2.Prediction:
    """What the model says about some steps: (steps, outputs)."""
    prediction = prediction_pb2.Prediction()
    encode_into(prediction, outputs, manifest, options)
    return prediction


def encode_into(
    prediction: prediction_pb2.Prediction, outputs: Floats, manifest: Manifest, options: prediction_pb2.OutputOptions
) -> None:
    """The same into an empty prediction where it belongs: a message that is put into another one is copied."""
    encode_tensor_into(prediction.outputs, outputs)
    labels = manifest.output.labels
    if labels:
        prediction.labels.extend(labels[best] for best in outputs.argmax(axis=-1).tolist())
    if options.probabilities or options.top_k:
        probabilities = manifest.output.probabilities(outputs)
        if options.probabilities:
            encode_tensor_into(prediction.probabilities, probabilities)
        if options.top_k:
            prediction.top.extend(_top(row, labels, options.top_k) for row in probabilities)


def _top(probabilities: Floats, labels: tuple[str, ...], k: int) -> prediction_pb2.TopLabels:
    best = np.argsort(-probabilities, kind="stable")[:k]
    return prediction_pb2.TopLabels(labels=[labels[i] for i in best], probabilities=probabilities[best].tolist())


def encode_tensor_into(tensor: tensor_pb2.Tensor, values: Floats) -> None:
    """An array of any shape into an empty tensor."""
    tensor.data_type = tensor_pb2.DATA_TYPE_FLOAT32
    tensor.shape.extend(values.shape)
    tensor.data = values.astype(WIRE_FLOAT32, copy=False).tobytes()
