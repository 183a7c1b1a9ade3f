"""The client's bookkeeping of an output, without a server."""

from typing import Any

import pytest

from rnnserve import Draining, GeneratedSymbol, QueueFull, RetryPolicy, RnnserveError
from rnnserve.exchange import CallEnded, Response
from rnnserve.generation import Output, generate_request
from rnnserve.v1 import real_time_service_pb2 as pb
from rnnserve.v1.tensor_pb2 import TEXT_UNIT_CHARACTER, TEXT_UNIT_WORD, TextUnit

POLICY = RetryPolicy(attempts=3, first_backoff_s=0.1)
DEFAULTS: dict[str, Any] = {
    "version": 0,
    "prompt": "",
    "max_symbols": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": None,
    "stop": (),
    "alternatives": 0,
    "deterministic": False,
}


def output(timeout_s: float = 30.0) -> Output:
    begun = Output(POLICY, timeout_s)
    begun.begin()
    return begun


def started(unit: TextUnit.ValueType = TEXT_UNIT_CHARACTER) -> Response[pb.GenerateResponse]:
    return Response(pb.GenerateResponse(started=pb.GenerationStarted(seed=7, text_unit=unit)))


def symbol(index: int, text: str) -> Response[pb.GenerateResponse]:
    return Response(pb.GenerateResponse(symbol=pb.GeneratedSymbol(index=index, text=text)))


def finished(**fields: Any) -> Response[pb.GenerateResponse]:
    return Response(pb.GenerateResponse(finished=pb.GenerationFinished(**fields)))


def refused(kind: type[RnnserveError] = QueueFull, retry_after_s: float | None = 1.0) -> CallEnded:
    return CallEnded(kind("not now", retry_after_s=retry_after_s))


@pytest.mark.parametrize(("unit", "text"), [(TEXT_UNIT_CHARACTER, "ab"), (TEXT_UNIT_WORD, "a b")])
def test_symbols_make_a_text_as_the_model_reads_texts(unit: TextUnit.ValueType, text: str) -> None:
    written = output()
    written.handle(started(unit))
    (first,) = written.handle(symbol(0, "a")).results
    assert (first, written.text) == (GeneratedSymbol(0, "a", 0.0, ()), "a")
    written.handle(symbol(1, "b"))
    assert (written.text, written.finish, written.done) == (text, None, False)
    written.handle(finished(reason=pb.FINISH_REASON_MAX_SYMBOLS))
    assert (written.finish, written.done) == ("max_symbols", True)


def test_a_refusal_that_passes_is_tried_again_after_the_time_that_it_named() -> None:
    written = output()
    pauses = [written.handle(refused()).reconnect_after_s for _ in range(2)]
    assert pauses[0] is not None
    assert pauses[1] is not None
    assert 1.05 <= pauses[0] <= 1.1
    assert 1.1 <= pauses[1] <= 1.2
    assert written.handle(refused()).reconnect_after_s is None
    assert isinstance(written.failure, QueueFull)


def test_what_will_not_change_is_not_tried_again() -> None:
    written = output()
    assert written.handle(refused(RnnserveError)).reconnect_after_s is None
    assert written.done


def test_nothing_is_tried_again_past_the_time_for_an_answer() -> None:
    written = output(timeout_s=1.0)
    assert written.handle(refused()).reconnect_after_s is None
    assert isinstance(written.failure, QueueFull)


def test_an_output_of_which_something_has_come_is_not_begun_again() -> None:
    written = output()
    written.handle(started())
    assert written.handle(refused(Draining)).reconnect_after_s is None
    assert isinstance(written.failure, Draining)


def test_no_temperature_at_all_is_sent_as_such() -> None:
    request = generate_request("m", **(DEFAULTS | {"temperature": 0.0}))
    assert (request.HasField("temperature"), request.temperature, request.HasField("seed")) == (True, 0.0, False)


@pytest.mark.parametrize("name", ["max_symbols", "top_k", "alternatives"])
def test_a_count_that_the_wire_has_no_place_for_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is a number from 0 to 4294967295, unlike -1$"):
        generate_request("m", **(DEFAULTS | {name: -1}))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_the_wire_has_no_place_for_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"^seed is a number from 0 to 18446744073709551615, unlike {seed}$"):
        generate_request("m", **(DEFAULTS | {"seed": seed}))


def test_one_stop_text_is_no_list_of_them() -> None:
    with pytest.raises(TypeError, match="list"):
        generate_request("m", **(DEFAULTS | {"stop": "abc"}))
