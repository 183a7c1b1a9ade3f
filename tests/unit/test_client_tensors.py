"""Arrays go over the wire and come back the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rnnserve import DataTypeMismatch, NotFinite, ShapeMismatch
from rnnserve.tensors import Array, array_from, sequence_tensor, steps_tensor
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

SHAPES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)


@given(arrays.arrays(np.float32, SHAPES))
def test_what_goes_out_comes_back(x: Array) -> None:
    tensor = sequence_tensor(x)
    assert (tensor.data_type, tuple(tensor.shape)) == (DATA_TYPE_FLOAT32, x.shape)
    np.testing.assert_array_equal(array_from(tensor), x)


FITTING = st.floats(-3e38, 3e38) | st.sampled_from([np.inf, -np.inf, np.nan])


@given(
    arrays.arrays("<f8", SHAPES, elements=FITTING)
    | arrays.arrays(st.sampled_from([">f4", "<f2", "i8", "u1", "?"]), SHAPES)
)
def test_any_numbers_travel_as_little_endian_float32(x: np.ndarray[tuple[int, int], np.dtype[np.generic]]) -> None:
    assert sequence_tensor(x).data == x.astype("<f4").tobytes()


@given(arrays.arrays(np.float32, SHAPES))
def test_memory_order_does_not_matter(x: Array) -> None:
    assert sequence_tensor(np.asfortranarray(x)) == sequence_tensor(x)
    np.testing.assert_array_equal(array_from(sequence_tensor(x[::-1, ::2])), x[::-1, ::2])


def test_one_step_may_leave_the_steps_dimension_out() -> None:
    assert steps_tensor([1, 2, 3]) == steps_tensor([[1, 2, 3]])


@pytest.mark.parametrize("x", [1.0, [[[1.0]]]])
def test_steps_of_another_rank_are_refused_before_they_are_sent(x: object) -> None:
    with pytest.raises(ShapeMismatch, match=r"\(steps, features\)"):
        steps_tensor(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("x", [1.0, [1.0, 2.0], [[[1.0]]], [[1.0, 2.0], [3.0]]])
def test_sequences_of_another_rank_are_refused_before_they_are_sent(x: object) -> None:
    with pytest.raises(ShapeMismatch) as caught:
        sequence_tensor(x)  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.code) == ("SHAPE_MISMATCH", "INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ([["a"]], "text"),
        ([[b"a"]], "bytes"),
        ([[1j]], "complex numbers"),
        ([[1.0, None]], "objects such as None"),
        (np.zeros((0, 3), object), "Python objects"),
    ],
)
def test_what_is_no_number_is_refused_in_plain_words_before_it_is_sent(x: object, said: str) -> None:
    with pytest.raises(DataTypeMismatch, match=f"^inputs must be numbers, not {said}$"):
        sequence_tensor(x)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("error")
def test_a_number_too_large_for_float32_is_refused_by_name_before_it_is_sent() -> None:
    with pytest.raises(NotFinite) as caught:
        steps_tensor(np.array([[np.inf, 1.0], [2.0, -1e300]]))
    assert str(caught.value) == "step 1 of the message has -1e+300 as feature 1, which does not fit float32"
    assert (caught.value.reason, caught.value.code) == ("NOT_FINITE", "INVALID_ARGUMENT")
    assert caught.value.metadata == {"step": "1", "feature": "1"}


def test_the_caller_may_write_into_what_comes_back() -> None:
    array = array_from(steps_tensor([1.0, 2.0]))
    array += 1
    assert array.tolist() == [[2.0, 3.0]]


def test_a_tensor_that_was_never_set_has_no_values() -> None:
    assert array_from(Tensor()).shape == (0, 0)
