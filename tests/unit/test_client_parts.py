"""Sequences that are too long for a message leave in parts, and their predictions are put together."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rnnserve import DataTypeMismatch, NotFinite, Prediction, RnnserveError, ShapeMismatch, TooManySteps
from rnnserve.bulk import Bulk
from rnnserve.exchange import InputsEnded, NextInput, Response, Turn
from rnnserve.tensors import Input, array_from, sequence_tensor
from rnnserve.v1.prediction_pb2 import Prediction as PredictionMessage
from rnnserve.v1.sequence_service_pb2 import PredictStreamRequest, PredictStreamResponse, Progress, SequencePart
from tests.unit.test_client_session import refusal

Requests = Iterator[PredictStreamRequest]


def stream_of(turn: Turn[PredictStreamRequest, Prediction | RnnserveError]) -> Requests:
    assert list(turn.requests) == []
    (stream,) = turn.streams
    return stream


def begin(bulk: Bulk, x: Input) -> Requests:
    return stream_of(bulk.handle(NextInput(x)))


def part_of(request: PredictStreamRequest) -> SequencePart:
    assert request.WhichOneof("request") == "part"
    return request.part


def error(number: int, reason: str, **metadata: str) -> Response[PredictStreamResponse]:
    return Response(PredictStreamResponse(id=number, error=refusal(reason, **metadata)))


def rows(number: int, first_step: int, *values: float, more: bool = False) -> Response[PredictStreamResponse]:
    message = PredictionMessage(outputs=sequence_tensor(np.array(values).reshape(-1, 1)), labels=["a"] * len(values))
    return Response(PredictStreamResponse(id=number, prediction=message, first_step=first_step, more=more))


def test_a_long_array_is_cut_into_parts_that_are_small_and_make_it_whole_again() -> None:
    values = np.random.default_rng(0).normal(size=(90_000, 7)).astype(np.float32)
    parts = [part_of(request) for request in begin(Bulk("raise"), values)]
    assert {part.id for part in parts} == {0}
    assert max(part.ByteSize() for part in parts) <= 2**20
    assert max(part.sequence.tensor.shape[0] for part in parts) <= 20_000
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    arrays = [array_from(part.sequence.tensor) for part in parts]
    assert [part.first_step for part in parts] == [0, *np.cumsum([len(array) for array in arrays])[:-1].tolist()]
    np.testing.assert_array_equal(np.concatenate(arrays), values)


def test_a_long_text_is_cut_into_parts() -> None:
    text = "añ" * 20_001
    parts = [part_of(request) for request in begin(Bulk("raise"), text)]
    assert [part.first_step for part in parts] == [0, 20_000, 40_000]
    assert "".join(part.sequence.text for part in parts) == text


def test_a_long_text_of_words_is_cut_between_them() -> None:
    bulk, words = Bulk("raise"), ["ñandú" * (1 + i % 9) for i in range(50_001)]
    bulk.unit = "word"
    parts = [part_of(request) for request in begin(bulk, "\n".join(words))]
    counts = [len(part.sequence.text.split()) for part in parts]
    assert max(counts) <= 20_000
    assert max(part.ByteSize() for part in parts) <= 2**20
    assert [part.first_step for part in parts] == [0, *np.cumsum(counts)[:-1].tolist()]
    assert [word for part in parts for word in part.sequence.text.split()] == words


def test_a_text_goes_whole_if_its_words_fit_however_long_it_is() -> None:
    bulk = Bulk("raise")
    bulk.unit = "word"
    (request,) = bulk.handle(NextInput("characters " * 20_000)).requests
    assert request.WhichOneof("request") == "sequence"
    assert len(begin_parts := list(begin(bulk, "characters " * 20_001))) == 2
    assert part_of(begin_parts[1]).sequence.text == "characters"


def test_a_text_that_was_refused_whole_is_cut_by_the_same_unit() -> None:
    bulk = Bulk("raise")
    bulk.unit = "word"
    bulk.handle(NextInput("so they say"))
    parts = stream_of(bulk.handle(error(0, "TOO_MANY_STEPS", limit="2")))
    assert [part_of(request).sequence.text for request in parts] == ["so they", "say"]


def test_a_file_is_read_as_it_is_sent(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.zeros((60_000, 2), np.float32))
    mapped = np.load(tmp_path / "long.npy", mmap_mode="r+")
    parts = begin(Bulk("raise"), mapped)
    next(parts)
    mapped[:] = 1.0
    assert array_from(part_of(next(parts)).sequence.tensor).min() == 1.0


def test_what_fits_goes_whole() -> None:
    (request,) = Bulk("raise").handle(NextInput(np.zeros((20_000, 3)))).requests
    assert request.WhichOneof("request") == "sequence"


@pytest.mark.parametrize(
    ("x", "kind"), [(np.zeros(30_000), ShapeMismatch), (np.full((30_000, 2), "a"), DataTypeMismatch)]
)
def test_what_is_no_sequence_is_refused_before_it_is_sent(x: Input, kind: type[RnnserveError]) -> None:
    bulk = Bulk("return")
    turn = bulk.handle(NextInput(x))
    assert (turn.requests, turn.streams) == ([], [])
    assert isinstance(turn.results[0], kind)


def test_a_prediction_is_put_together_and_the_others_keep_their_order() -> None:
    bulk = Bulk("raise")
    list(begin(bulk, np.zeros((30_000, 1))))
    bulk.handle(NextInput([[1.0]]))
    assert bulk.handle(rows(0, 0, 1.0, 2.0, more=True)).results == []
    assert bulk.handle(rows(1, 0, 9.0)).results == []
    first, second = bulk.handle(rows(0, 2, 3.0)).results
    assert isinstance(first, Prediction)
    assert isinstance(second, Prediction)
    assert (first.outputs.ravel().tolist(), first.labels) == ([1.0, 2.0, 3.0], ("a", "a", "a"))
    assert second.output.tolist() == [9.0]


def test_an_error_after_parts_of_a_prediction_takes_their_place() -> None:
    bulk = Bulk("return")
    list(begin(bulk, np.zeros((30_000, 1))))
    bulk.handle(rows(0, 0, 1.0, more=True))
    (result,) = bulk.handle(error(0, "EXECUTION_FAILED")).results
    assert isinstance(result, RnnserveError)
    assert (result.reason, result.index) == ("EXECUTION_FAILED", 0)


def test_progress_is_told_for_what_goes_in_parts() -> None:
    told: list[tuple[int, float]] = []
    bulk = Bulk("raise", lambda index, share: told.append((index, share)))
    bulk.handle(NextInput([[1.0]]))
    list(begin(bulk, np.zeros((30_000, 1))))
    for progress in (Progress(received_steps=7), Progress(computed_steps=1, total_steps=4)):
        bulk.handle(Response(PredictStreamResponse(id=1, progress=progress)))
    bulk.handle(rows(0, 0, 1.0))
    bulk.handle(rows(1, 0, 1.0))
    assert told == [(1, 0.0), (1, 0.0), (1, 0.25), (1, 1.0)]


def test_a_sequence_that_is_too_long_for_this_server_is_sent_again_in_parts_that_are_not() -> None:
    bulk = Bulk("raise")
    values = np.arange(150.0).reshape(50, 3)
    bulk.handle(NextInput(values))
    parts = [part_of(request) for request in stream_of(bulk.handle(error(0, "TOO_MANY_STEPS", limit="20")))]
    assert [part.sequence.tensor.shape[0] for part in parts] == [20, 20, 10]
    assert np.concatenate([array_from(part.sequence.tensor) for part in parts]).tolist() == values.tolist()
    parts = [part_of(request) for request in begin(bulk, values)]  # it has learnt that
    assert [part.id for part in parts] == [1, 1, 1]
    parts = [part_of(r) for r in stream_of(bulk.handle(error(1, "MESSAGE_TOO_LARGE", limit="400")))]
    assert [part.sequence.tensor.shape[0] for part in parts] == [12, 12, 12, 12, 2]
    assert max(part.ByteSize() for part in parts) <= 400


def test_a_refusal_that_smaller_parts_do_not_help_stands() -> None:
    bulk = Bulk("return")
    list(begin(bulk, np.zeros((30_000, 1))))
    (result,) = bulk.handle(error(0, "TOO_MANY_STEPS", limit="25000")).results
    assert isinstance(result, TooManySteps)


def test_what_is_left_of_a_refused_sequence_is_not_sent() -> None:
    bulk = Bulk("return")
    parts = begin(bulk, np.zeros((90_000, 1)))
    next(parts)
    bulk.handle(error(0, "NOT_FINITE"))
    assert list(parts) == []


def test_a_value_that_does_not_fit_is_refused_by_its_step_in_the_sequence() -> None:
    bulk = Bulk("return")
    values = np.zeros((50_000, 1))
    values[45_000] = 1e300
    *_, dropped = begin(bulk, values)
    assert part_of(dropped).last
    assert not part_of(dropped).HasField("sequence")
    (result,) = bulk.handle(error(0, "STEPS_MISSING")).results
    assert isinstance(result, NotFinite)
    assert result.metadata["step"] == "45000"
    assert "step 45000 of the sequence" in result.message


def test_a_file_that_can_no_longer_be_read_is_an_error_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> None:
        raise OSError("the disk is gone")

    bulk = Bulk("return")
    parts = begin(bulk, np.zeros((50_000, 1)))
    monkeypatch.setattr("rnnserve.parts.sequence_tensor", unreadable)
    bulk.handle(InputsEnded())
    list(parts)
    bulk.handle(error(0, "STEPS_MISSING"))
    assert bulk.done
    assert isinstance(bulk.failure, OSError)
