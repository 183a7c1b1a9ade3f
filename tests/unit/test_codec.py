import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models.manifest import Manifest, TextInput
from models.recurrent import NetworkSpec
from rnnserve.v1.prediction_pb2 import OutputOptions, Prediction, StepSelection
from rnnserve.v1.real_time_service_pb2 import StepBatch, Steps, TextSteps
from rnnserve.v1.tensor_pb2 import DATA_TYPE_UNSPECIFIED, Tensor
from service.api.codec import Floats, check_options, decode, decode_batch, encode_into, encode_tensor_into
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
from tests.support.bundles import LABELS, features, manifest
from tests.support.wire import array, tensor


def encode(outputs: Floats, described: Manifest, options: OutputOptions) -> Prediction:
    prediction = Prediction()
    encode_into(prediction, outputs, described, options)
    return prediction


NAN, INFINITY = float("nan"), float("inf")
SYMBOLS = tuple(string.ascii_lowercase + "üß😀")


def numeric(width: int = 3, labels: tuple[str, ...] = LABELS, **rules: Any) -> Manifest:
    spec = NetworkSpec(cell="tanh", features=width, hidden_size=2, outputs=len(labels) or 4)
    return manifest("numeric", spec, features(width, **rules), labels=labels)


TEXT = manifest(
    "text",
    NetworkSpec(cell="tanh", symbols=len(SYMBOLS), embedding_size=2, hidden_size=2, outputs=4),
    TextInput(symbols=SYMBOLS),
)


WORDS = manifest(
    "words",
    NetworkSpec(cell="tanh", symbols=3, embedding_size=2, hidden_size=2, outputs=4),
    TextInput(unit="word", symbols=("so", "they", "say")),
)


def tensor_of(values: Floats) -> Tensor:
    message = Tensor()
    encode_tensor_into(message, values)
    return message


def read(steps: Steps, described: Manifest, max_steps: int = 10) -> Any:
    return decode(steps, described, max_steps=max_steps)


def floats(**bounds: Any) -> st.SearchStrategy[float]:
    return st.floats(width=32, allow_nan=False, allow_infinity=False, **bounds)


matrices = arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=floats())


@given(values=matrices)
def test_numbers_come_through_unchanged_to_the_bit(values: Floats) -> None:
    decoded = read(Steps(tensor=tensor_of(values)), numeric(values.shape[1]))
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == values.tobytes()
    assert decoded.shape == values.shape


@given(values=arrays.arrays(np.float32, arrays.array_shapes(max_dims=4), elements=floats()))
def test_a_tensor_is_row_major_and_little_endian(values: Floats) -> None:
    for same in (values, np.asfortranarray(values)):
        message = tensor_of(same)
        assert array(message).tobytes() == values.astype("<f4").tobytes(order="C")
        assert tuple(message.shape) == values.shape


@given(text=st.text(st.sampled_from(SYMBOLS), min_size=1, max_size=10))
def test_a_text_becomes_the_places_of_its_symbols(text: str) -> None:
    decoded = read(Steps(text=text), TEXT)
    assert decoded.dtype == np.int64
    assert "".join(SYMBOLS[number] for number in decoded) == text


def spoiled(**parts: Any) -> Steps:
    message = tensor(np.zeros((2, 3)))
    for name, value in parts.items():
        if name == "shape":
            del message.shape[:]
            message.shape.extend(value)
        else:
            setattr(message, name, value)
    return Steps(tensor=message)


def with_value(value: float) -> Steps:
    values = np.zeros((3, 3))
    values[1, 2] = value
    return Steps(tensor=tensor(values))


REFUSALS: dict[str, tuple[Steps, Manifest, type[ServingError], str, dict[str, str]]] = {
    "neither": (Steps(), numeric(), StepsMissing, "input", {}),
    "text to numeric": (Steps(text="ab"), numeric(), InputKindMismatch, "text", {}),
    "tensor to text": (with_value(0), TEXT, InputKindMismatch, "tensor", {}),
    "no type": (
        spoiled(data_type=DATA_TYPE_UNSPECIFIED), numeric(), DataTypeMismatch, "tensor.data_type", {},
    ),
    "unknown type": (spoiled(data_type=99), numeric(), DataTypeMismatch, "tensor.data_type", {}),
    "no shape": (spoiled(shape=[]), numeric(), ShapeMismatch, "tensor.shape", {"features": "3"}),
    "rank 1": (spoiled(shape=[6]), numeric(), ShapeMismatch, "tensor.shape", {"features": "3"}),
    "rank 3": (spoiled(shape=[1, 2, 3]), numeric(), ShapeMismatch, "tensor.shape", {"features": "3"}),
    "width": (spoiled(shape=[3, 2]), numeric(), ShapeMismatch, "tensor.shape", {"features": "3"}),
    "too few bytes": (spoiled(data=b"\0" * 23), numeric(), ShapeMismatch, "tensor.data", {}),
    "too many bytes": (spoiled(data=b"\0" * 25), numeric(), ShapeMismatch, "tensor.data", {}),
    "no bytes": (spoiled(data=b""), numeric(), ShapeMismatch, "tensor.data", {}),
    "no steps": (Steps(tensor=tensor(np.zeros((0, 3)))), numeric(), StepsMissing, "tensor.shape", {}),
    "negative": (spoiled(shape=[-2, 3]), numeric(), StepsMissing, "tensor.shape", {}),
    "both negative": (spoiled(shape=[-2, -3]), numeric(), ShapeMismatch, "tensor.shape", {"features": "3"}),
    "too many": (
        Steps(tensor=tensor(np.zeros((11, 3)))), numeric(), TooManySteps, "tensor.shape", {"limit": "10"},
    ),
    "shape of a giant": (spoiled(shape=[2**62, 3]), numeric(), TooManySteps, "tensor.shape", {"limit": "10"}),
    "NaN": (with_value(NAN), numeric(), NotFinite, "tensor.data", {"step": "1", "feature": "2"}),
    "infinity": (with_value(-INFINITY), numeric(), NotFinite, "tensor.data", {"step": "1", "feature": "2"}),
    "infinity, held": (
        with_value(INFINITY), numeric(missing_values="hold_last"), NotFinite, "tensor.data",
        {"step": "1", "feature": "2"},
    ),
    "no text": (Steps(text=""), TEXT, StepsMissing, "text", {}),
    "long text": (Steps(text="a" * 11), TEXT, TooManySteps, "text", {"limit": "10"}),
    "no word": (Steps(text=" \n"), WORDS, StepsMissing, "text", {}),
    "many words": (Steps(text="so " * 11), WORDS, TooManySteps, "text", {"limit": "10"}),
    "word": (Steps(text="so  they, say"), WORDS, UnknownSymbol, "text", {"symbol": "they,", "place": "1"}),
    "symbol": (Steps(text="aüAa"), TEXT, UnknownSymbol, "text", {"symbol": "A", "place": "2"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_model_cannot_read_is_refused_by_field(name: str) -> None:
    steps, described, kind, field, metadata = REFUSALS[name]
    with pytest.raises(ServingError) as refusal:
        read(steps, described)
    assert (type(refusal.value), refusal.value.field, refusal.value.metadata) == (kind, field, metadata)


@pytest.mark.parametrize("rule", ["hold_last", "mean"])
def test_a_missing_value_passes_where_the_model_has_a_rule_for_it(rule: str) -> None:
    decoded = read(with_value(NAN), numeric(missing_values=rule))
    assert np.isnan(decoded[1, 2])
    assert np.isnan(decoded).sum() == 1


def test_as_many_steps_as_may_be_pass() -> None:
    assert len(read(Steps(tensor=tensor(np.zeros((10, 3)))), numeric())) == 10
    assert len(read(Steps(text="ü" * 10), TEXT)) == 10


def test_as_many_words_as_may_be_pass_whatever_stands_between_them() -> None:
    assert read(Steps(text="\tso they\u2003say\n" * 3 + "so  "), WORDS).tolist() == [0, 1, 2] * 3 + [0]


def test_a_later_part_of_a_sequence_names_the_word_in_all_of_it() -> None:
    with pytest.raises(UnknownSymbol, match=r"^'it' at word 102 is none of") as refusal:
        decode(Steps(text="so they it"), WORDS, max_steps=10, first_step=100)
    assert refusal.value.metadata["place"] == "102"


def test_of_several_sessions_what_is_not_one_step_is_refused_alone() -> None:
    steps = ["say", "", "so they", "it", " so "]
    batch = StepBatch(handles=range(5), text=TextSteps(steps=steps))
    inputs, refused = decode_batch(batch, WORDS)
    assert (inputs[0], inputs[4]) == (2, 0)
    assert {i: type(error) for i, error in refused.items()} == {1: StepsMissing, 2: TooManySteps, 3: UnknownSymbol}


OUTPUTS = np.array([[0.0, 2.0, 1.0, -1.0], [5.0, 5.0, 0.0, 0.0]], np.float32)


def test_outputs_come_as_they_are_and_the_largest_one_names_the_label() -> None:
    prediction = encode(OUTPUTS, numeric(), OutputOptions())
    assert array(prediction.outputs).tolist() == OUTPUTS.tolist()
    assert list(prediction.labels) == ["east", "north"]
    assert not prediction.HasField("probabilities")
    assert not prediction.top


def test_a_model_without_labels_gives_outputs_only() -> None:
    assert list(encode(OUTPUTS, numeric(labels=()), OutputOptions()).labels) == []


@given(outputs=arrays.arrays(np.float32, (3, 4), elements=floats(min_value=-1e4, max_value=1e4)))
def test_probabilities_are_the_softmax_of_the_outputs(outputs: Floats) -> None:
    found = array(encode(outputs, numeric(), OutputOptions(probabilities=True)).probabilities)
    exact = outputs.astype(np.longdouble)
    powers = np.exp(exact - exact.max(axis=1)[:, np.newaxis])
    np.testing.assert_allclose(found, powers / powers.sum(axis=1)[:, np.newaxis], atol=1e-5)


@given(outputs=arrays.arrays(np.float32, (2, 4), elements=floats(min_value=-20, max_value=20)), k=st.integers(1, 4))
def test_the_top_labels_are_the_most_probable_ones_in_order(outputs: Floats, k: int) -> None:
    prediction = encode(outputs, numeric(), OutputOptions(top_k=k, probabilities=True))
    for row, label, top in zip(array(prediction.probabilities), prediction.labels, prediction.top, strict=True):
        probability = dict(zip(LABELS, row.tolist(), strict=True))
        assert len(set(top.labels)) == k
        assert list(top.probabilities) == [probability[name] for name in top.labels]
        assert list(top.probabilities) == sorted(row.tolist(), reverse=True)[:k]
        assert probability[label] == max(row)


@given(
    outputs=arrays.arrays(np.float32, (3, 4), elements=floats(min_value=-20, max_value=20)),
    k=st.integers(0, 4),
    threshold=floats(min_value=0, max_value=1),
)
def test_what_is_less_probable_than_the_threshold_is_left_out_and_nothing_else_changes(
    outputs: Floats, k: int, threshold: float
) -> None:
    whole = encode(outputs, numeric(), OutputOptions(top_k=k, probabilities=True))
    sure = encode(outputs, numeric(), OutputOptions(top_k=k, probabilities=True, threshold=threshold))
    assert (sure.outputs, sure.probabilities) == (whole.outputs, whole.probabilities)
    best = array(whole.probabilities).max(axis=1)
    labels = [label if p >= threshold else "" for label, p in zip(whole.labels, best, strict=True)]
    assert list(sure.labels) == labels
    assert [list(top.labels) for top in sure.top] == [
        [label for label, p in zip(top.labels, top.probabilities, strict=True) if p >= threshold] for top in whole.top
    ]
    assert all(len(top.labels) == len(top.probabilities) for top in sure.top)


def test_a_label_just_as_probable_as_the_threshold_is_given() -> None:
    even = np.zeros((1, 4), np.float32)  # each label has a quarter
    just = encode(even, numeric(), OutputOptions(top_k=2, threshold=0.25))
    assert (list(just.labels), list(just.top[0].labels)) == (["north"], ["north", "east"])
    more = encode(even, numeric(), OutputOptions(top_k=2, threshold=np.nextafter(np.float32(0.25), np.float32(1))))
    assert (list(more.labels), len(more.top), list(more.top[0].labels)) == ([""], 1, [])


def test_a_threshold_alone_asks_for_no_probabilities() -> None:
    prediction = encode(OUTPUTS, numeric(), OutputOptions(threshold=0.5))
    assert list(prediction.labels) == ["east", ""]  # 0.64 and, twice, 0.497
    assert not prediction.HasField("probabilities")
    assert not prediction.top


@pytest.mark.parametrize(
    ("described", "options", "field", "metadata"),
    [
        (numeric(labels=()), {"probabilities": True}, "options.probabilities", {}),
        (numeric(labels=()), {"top_k": 1}, "options.top_k", {"limit": "0"}),
        (numeric(), {"top_k": 5}, "options.top_k", {"limit": "4"}),
        (numeric(), {"steps": 77}, "options.steps", {}),
        (numeric(labels=()), {"threshold": 0.5}, "options.threshold", {}),
        (numeric(), {"threshold": -0.1}, "options.threshold", {"limit": "1"}),
        (numeric(), {"threshold": np.nextafter(np.float32(1), np.float32(2))}, "options.threshold", {"limit": "1"}),
        (numeric(), {"threshold": INFINITY}, "options.threshold", {"limit": "1"}),
        (numeric(), {"threshold": NAN}, "options.threshold", {"limit": "1"}),
    ],
)
def test_options_that_the_model_cannot_serve_are_refused(
    described: Manifest, options: dict[str, Any], field: str, metadata: dict[str, str]
) -> None:
    with pytest.raises(FieldInvalid) as refusal:
        check_options(OutputOptions(**options), described)
    assert (refusal.value.field, refusal.value.metadata) == (field, metadata)


@pytest.mark.parametrize("steps", StepSelection.values())
def test_options_that_fit_pass(steps: Any) -> None:
    check_options(OutputOptions(steps=steps, top_k=4, probabilities=True, threshold=1), numeric())
    check_options(OutputOptions(steps=steps), numeric(labels=()))
