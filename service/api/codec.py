"""Between the messages of the contract and the arrays of the engine, for one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.beam import MAX_BEAM_WIDTH, Decoding, Hypothesis
from models.manifest import FeatureInput, Manifest, TextInput, UnknownSymbolError
from models.recurrent import DecoderSpec
from rnnserve.v1 import prediction_pb2, real_time_service_pb2, sequence_service_pb2, tensor_pb2
from service.errors import (
    DataTypeMismatch,
    FieldInvalid,
    InputKindMismatch,
    NotFinite,
    ServingError,
    ShapeMismatch,
    StepsMissing,
    TooManySteps,
    UnknownSymbol,
)

_TEXT_UNITS = {"character": tensor_pb2.TEXT_UNIT_CHARACTER, "word": tensor_pb2.TEXT_UNIT_WORD}
WIRE_FLOAT32 = np.dtype("<f4")
MAX_LENGTH_PENALTY = 2.0
PIECE_BYTES = 2**20  # of a prediction that goes out in several

Floats = NDArray[np.float32]
Answer: TypeAlias = Floats | list[Hypothesis]
"""Outputs (steps, outputs), or the hypotheses of an encoder-decoder, the best first."""
Input = real_time_service_pb2.Steps | sequence_service_pb2.Sequence
"""Each has a oneof `input` of `tensor` and `text`."""

Refused = dict[int, ServingError]
"""Why, by the number of the step in the message."""


def decode(message: Input, manifest: Manifest, *, max_steps: int, first_step: int | None = None) -> NDArray[np.generic]:
    """The steps of a message: (steps, features) float32 or (steps,) int64.

    `first_step` is the index of its first one in the sequence of which it is a part; refusals then name steps in that.

    Raises InputKindMismatch, DataTypeMismatch, ShapeMismatch, StepsMissing, TooManySteps, NotFinite, UnknownSymbol;
    their field paths begin inside the message.
    """
    kind = message.WhichOneof("input")
    if kind is None:
        raise StepsMissing("there is neither tensor nor text", field="input")
    if isinstance(manifest.input, TextInput):
        if kind != "text":
            raise InputKindMismatch(f"model {manifest.name!r} reads text, not a tensor", field="tensor")
        return _decode_text(message.text, manifest.input, max_steps, first_step or 0)
    if kind != "tensor":
        raise InputKindMismatch(f"model {manifest.name!r} reads a tensor, not text", field="text")
    return _decode_features(message.tensor, manifest.input, max_steps, first_step)


def text_unit(manifest: Manifest) -> tensor_pb2.TextUnit.ValueType:
    """What a step of a text is to the model."""
    if isinstance(manifest.input, TextInput):
        return _TEXT_UNITS[manifest.input.unit]
    return tensor_pb2.TEXT_UNIT_UNSPECIFIED


def decode_batch(batch: real_time_service_pb2.StepBatch, manifest: Manifest) -> tuple[NDArray[np.generic], Refused]:
    """A step of each handle: (handles, features) float32 or (handles,) int64, and which of them are refused.

    Raises what `decode` does, where it is not about single steps.
    """
    kind, count = batch.WhichOneof("input"), len(batch.handles)
    if kind is None:
        raise StepsMissing("there is neither tensor nor text", field="input")
    if isinstance(manifest.input, TextInput):
        if kind != "text":
            raise InputKindMismatch(f"model {manifest.name!r} reads text, not a tensor", field="tensor")
        _check_batch_size(len(batch.text.steps), count, "text")
        return _decode_each(batch.text.steps, manifest.input)
    if kind != "tensor":
        raise InputKindMismatch(f"model {manifest.name!r} reads a tensor, not text", field="text")
    values = _values(batch.tensor, manifest.input, lambda steps: _check_batch_size(steps, count, "tensor.shape"))
    return values, _refused_rows(values, manifest.input)


def _check_batch_size(steps: int, handles: int, field: str) -> None:
    if steps != handles:
        raise ShapeMismatch(f"there are {steps} steps of {handles} handles", field=field, handles=handles)


def _decode_each(steps: Sequence[str], spec: TextInput) -> tuple[NDArray[np.int64], Refused]:
    symbols, refused = np.zeros(len(steps), np.int64), Refused()
    for i, step in enumerate(steps):
        try:
            number = spec.numbers.get(step)  # a symbol is one step
            symbols[i] = _decode_text(step, spec, max_steps=1)[0] if number is None else number
        except (StepsMissing, TooManySteps, UnknownSymbol) as error:
            refused[i] = error
    return symbols, refused


def _refused_rows(values: Floats, spec: FeatureInput) -> Refused:
    wrong = _wrong_values(values, spec)
    if wrong is None:
        return {}
    return {i: _not_finite(values, spec, i, int(wrong[i].argmax())) for i in np.nonzero(wrong.any(axis=1))[0].tolist()}


def _decode_text(text: str, spec: TextInput, max_steps: int, first_place: int = 0) -> NDArray[np.int64]:
    steps = spec.steps(text, max_steps)
    _check_count(len(steps), max_steps, "text")
    try:
        return spec.numbers_of(steps)
    except UnknownSymbolError as within_text:
        error = UnknownSymbolError(within_text.symbol, first_place + within_text.place, spec.unit)
        raise UnknownSymbol(str(error), field="text", symbol=error.symbol, place=error.place) from None


def _decode_features(tensor: tensor_pb2.Tensor, spec: FeatureInput, max_steps: int, first_step: int | None) -> Floats:
    values = _values(tensor, spec, lambda steps: _check_count(steps, max_steps, "tensor.shape"))
    wrong = _wrong_values(values, spec)
    if wrong is not None:
        step, feature = np.argwhere(wrong)[0].tolist()
        raise _not_finite(values, spec, step, feature, first_step)
    return values


def _values(tensor: tensor_pb2.Tensor, spec: FeatureInput, check_steps: Callable[[int], None]) -> Floats:
    """(steps, features) as they came."""
    if tensor.data_type != tensor_pb2.DATA_TYPE_FLOAT32:
        raise DataTypeMismatch("the type of the values must be DATA_TYPE_FLOAT32", field="tensor.data_type")
    shape, width, data = tuple(tensor.shape), len(spec.feature_names), tensor.data
    if len(shape) != 2 or shape[1] != width:
        raise ShapeMismatch(f"the shape must be (steps, {width}), not {shape}", field="tensor.shape", features=width)
    check_steps(shape[0])
    size_bytes = WIRE_FLOAT32.itemsize * shape[0] * width
    if len(data) != size_bytes:
        raise ShapeMismatch(
            f"a tensor of shape {shape} has {size_bytes} bytes, not {len(data)}",
            field="tensor.data",
        )
    return np.ndarray(shape, WIRE_FLOAT32, data).astype(np.float32)


def _check_count(steps: int, max_steps: int, field: str) -> None:
    if steps < 1:
        raise StepsMissing("there must be at least one step", field=field)
    if steps > max_steps:
        raise TooManySteps(f"there are more than {max_steps} steps", field=field, limit=max_steps)


def _wrong_values(values: Floats, spec: FeatureInput) -> NDArray[np.bool_] | None:
    """Which of them (steps, features) the model does not take; None = it takes all."""
    if math.isfinite(np.vdot(values, values)):  # takes a third of the time; infinite, too, for what is just large
        return None
    finite = np.isfinite(values)
    if finite.all():
        return None
    wrong: NDArray[np.bool_] = ~finite if spec.missing_values == "refuse" else np.isinf(values)
    return wrong if wrong.any() else None


def _not_finite(
    values: Floats, spec: FeatureInput, step: int, feature: int, first_step: int | None = None
) -> NotFinite:
    number, of = (step, "message") if first_step is None else (first_step + step, "sequence")
    return NotFinite(
        f"step {number} of the {of} has {values[step, feature]} as {spec.feature_names[feature]!r}",
        field="tensor.data", step=number, feature=feature,
    )  # fmt: skip


def check_options(options: prediction_pb2.OutputOptions, manifest: Manifest) -> None:
    """Raises FieldInvalid if the model cannot give what is asked for."""
    if manifest.network.decoder is not None:
        _check_decoding(options, manifest.name, manifest.network.decoder)
        return
    if options.HasField("decoding"):
        raise FieldInvalid(f"model {manifest.name!r} is no encoder-decoder", field="options.decoding")
    labels = len(manifest.output.labels)
    if options.probabilities and not labels:
        raise FieldInvalid(f"model {manifest.name!r} has no labels", field="options.probabilities")
    if options.top_k > labels:
        raise FieldInvalid(
            f"model {manifest.name!r} has {labels} labels, fewer than {options.top_k}",
            field="options.top_k",
            limit=labels,
        )
    if options.threshold and not labels:
        raise FieldInvalid(f"model {manifest.name!r} has no labels", field="options.threshold")
    if not 0 <= options.threshold <= 1:
        message = f"threshold is {options.threshold:g}, not 0 to 1"
        raise FieldInvalid(message, field="options.threshold", limit=1)
    if options.steps not in prediction_pb2.StepSelection.values():
        raise FieldInvalid(f"there is no step selection {options.steps}", field="options.steps")


def _check_decoding(options: prediction_pb2.OutputOptions, name: str, decoder: DecoderSpec) -> None:
    for field in ("steps", "probabilities", "top_k", "threshold"):
        if getattr(options, field):
            raise FieldInvalid(
                f"model {name!r} is an encoder-decoder, which writes hypotheses", field=f"options.{field}"
            )
    asked = options.decoding
    for field, limit, meaning in (
        ("beam_width", MAX_BEAM_WIDTH, "the most"),
        ("n_best", asked.beam_width or 1, "its beam_width"),
        ("max_labels", decoder.max_labels, f"the most that {name!r} writes"),
    ):
        if (value := getattr(asked, field)) > limit:
            message = f"{field} is {value}, more than {limit}, {meaning}"
            raise FieldInvalid(message, field=f"options.decoding.{field}", limit=limit)
    if not 0 <= asked.length_penalty <= MAX_LENGTH_PENALTY:
        message = f"length_penalty is {asked.length_penalty:g}, not 0 to {MAX_LENGTH_PENALTY:g}"
        raise FieldInvalid(message, field="options.decoding.length_penalty", limit=MAX_LENGTH_PENALTY)
    if asked.attention and not decoder.attention:
        raise FieldInvalid(f"model {name!r} has no attention", field="options.decoding.attention")


def decoding_of(options: prediction_pb2.OutputOptions, decoder: DecoderSpec) -> Decoding:
    """What checked options ask for."""
    asked = options.decoding
    return Decoding(
        max_labels=asked.max_labels or decoder.max_labels,
        beam_width=asked.beam_width or 1,
        n_best=asked.n_best or 1,
        length_penalty=asked.length_penalty,
        attention=asked.attention,
    )


def wants_all_steps(options: prediction_pb2.OutputOptions, manifest: Manifest) -> bool:
    """Whether the prediction of a sequence is about each of its steps, or about the last one or the whole only."""
    if options.steps == prediction_pb2.STEP_SELECTION_UNSPECIFIED:
        return manifest.pattern != "many-to-one"
    return options.steps == prediction_pb2.STEP_SELECTION_ALL


def row_bytes(manifest: Manifest, options: prediction_pb2.OutputOptions) -> int:
    """About how much the prediction about one step takes in a message, at most."""
    label_bytes = max((len(label.encode()) + 2 for label in manifest.output.labels), default=0)
    number_bytes = manifest.network.outputs * WIRE_FLOAT32.itemsize * (1 + options.probabilities)
    return number_bytes + label_bytes + options.top_k * (label_bytes + WIRE_FLOAT32.itemsize) + 8


def answer_bytes(manifest: Manifest, options: prediction_pb2.OutputOptions, steps: int) -> int:
    """About how much the answer about a sequence of so many steps takes, at most; of a search, all that it holds."""
    if manifest.network.decoder is None:
        return (steps if wants_all_steps(options, manifest) else 1) * row_bytes(manifest, options)
    asked = decoding_of(options, manifest.network.decoder)
    label_bytes = max(len(label.encode()) + 2 for label in manifest.output.labels)
    attention_bytes = steps * WIRE_FLOAT32.itemsize if asked.attention else 0
    return asked.beam_width * asked.max_labels * (label_bytes + attention_bytes)


def pieces(
    answer: Answer, manifest: Manifest, options: prediction_pb2.OutputOptions
) -> Iterator[tuple[int, Answer, bool]]:
    """An answer in pieces of about PIECE_BYTES: the first step of each, the piece, and whether more follow."""
    if isinstance(answer, list):
        yield 0, answer, False
        return
    rows = rows_of_piece(manifest, options)
    for first in range(0, len(answer), rows):
        yield first, answer[first : first + rows], first + rows < len(answer)


def rows_of_piece(manifest: Manifest, options: prediction_pb2.OutputOptions) -> int:
    """About how many steps make one."""
    return max(1, PIECE_BYTES // row_bytes(manifest, options))


def encode_answer_into(
    prediction: prediction_pb2.Prediction, answer: Answer, manifest: Manifest, options: prediction_pb2.OutputOptions
) -> None:
    """What the model says about a sequence, or a piece of it, into an empty prediction where it belongs."""
    if isinstance(answer, list):
        _encode_hypotheses_into(prediction, answer, manifest.output.labels)
    else:
        encode_into(prediction, answer, manifest, options)


def _encode_hypotheses_into(
    prediction: prediction_pb2.Prediction, hypotheses: list[Hypothesis], labels: tuple[str, ...]
) -> None:
    for hypothesis in hypotheses:
        message = prediction.hypotheses.add(
            labels=[labels[i] for i in hypothesis.labels], score=hypothesis.score, is_cut=hypothesis.is_cut
        )
        if hypothesis.attention is not None:
            encode_tensor_into(message.attention, hypothesis.attention)
    prediction.labels.extend(prediction.hypotheses[0].labels)


def encode_into(
    prediction: prediction_pb2.Prediction, outputs: Floats, manifest: Manifest, options: prediction_pb2.OutputOptions
) -> None:
    """What the model says about some steps, (steps, outputs), into an empty prediction where it belongs.

    For a message that is put into another one is copied.
    """
    encode_tensor_into(prediction.outputs, outputs)
    labels = manifest.output.labels
    if labels:
        prediction.labels.extend(labels[best] for best in outputs.argmax(axis=-1).tolist())
    if options.probabilities or options.top_k or options.threshold:
        probabilities = manifest.output.probabilities(outputs)
        if options.threshold:
            for unsure in np.flatnonzero(probabilities.max(axis=-1) < options.threshold).tolist():
                prediction.labels[unsure] = ""
        if options.probabilities:
            encode_tensor_into(prediction.probabilities, probabilities)
        if options.top_k:
            prediction.top.extend(top_labels(row, labels, options.top_k, options.threshold) for row in probabilities)


def top_labels(
    probabilities: NDArray[np.floating[Any]], labels: tuple[str, ...], k: int, threshold: float = 0.0
) -> prediction_pb2.TopLabels:
    """(labels,) -> the k most probable ones, without those below the threshold."""
    best = np.argsort(-probabilities, kind="stable")[:k]
    if threshold:
        best = best[probabilities[best] >= threshold]
    return prediction_pb2.TopLabels(labels=[labels[i] for i in best], probabilities=probabilities[best].tolist())


def encode_tensor_into(tensor: tensor_pb2.Tensor, values: Floats) -> None:
    """An array of any shape into an empty tensor."""
    tensor.data_type = tensor_pb2.DATA_TYPE_FLOAT32
    tensor.shape.extend(values.shape)
    tensor.data = values.astype(WIRE_FLOAT32, copy=False).tobytes()
