"""How answers are asked for: what they carry, and how hypotheses are searched for."""

from typing import Any

import pytest

from rnnserve import Decoding
from rnnserve.requests import output_options
from rnnserve.v1 import prediction_pb2 as pb


def test_a_threshold_is_sent_as_it_is_for_the_server_to_judge() -> None:
    assert output_options(None, False, 0, 0.75) == pb.OutputOptions(threshold=0.75)
    assert output_options(None, False, 0, -7.0).threshold == -7.0


def test_a_decoding_is_sent_field_by_field() -> None:
    decoding = Decoding(beam_width=5, n_best=3, length_penalty=0.5, max_labels=20, attention=True)
    assert output_options(None, False, 0, decoding=decoding) == pb.OutputOptions(
        decoding=pb.Decoding(beam_width=5, n_best=3, length_penalty=0.5, max_labels=20, attention=True)
    )


def test_a_decoding_is_greedy_unless_told_otherwise() -> None:
    sent = output_options(None, False, 0, decoding=Decoding()).decoding
    assert sent == pb.Decoding(beam_width=1, n_best=1)


def test_a_decoding_is_sent_only_if_it_is_given() -> None:
    assert not output_options("all", True, 2).HasField("decoding")
    assert not output_options("all", True, 2, decoding=None).HasField("decoding")


@pytest.mark.parametrize("field", ["beam_width", "n_best", "max_labels"])
@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_count_that_the_wire_has_no_place_for_is_refused_by_name(field: str, value: int) -> None:
    given: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"^{field} is a number from 0 to 4294967295, unlike {value}$"):
        Decoding(**given)


def test_bounds_that_the_wire_can_hold_are_the_servers() -> None:
    sent = output_options(None, False, 0, decoding=Decoding(beam_width=17, n_best=18, length_penalty=-1.0)).decoding
    assert (sent.beam_width, sent.n_best, sent.length_penalty) == (17, 18, -1.0)
