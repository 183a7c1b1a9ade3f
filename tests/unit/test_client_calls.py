"""Which calls are tried again, when, and for how long; and how models are read. No server, no waiting."""

from typing import TypeVar

import pytest

from rnnserve import ModelNotFound, QueueFull, RetryPolicy, RnnserveError, TimedOut, Unreachable
from rnnserve.calls import Call, Calls, Pause, Program
from rnnserve.models import Model, model_from
from rnnserve.v1 import model_service_pb2 as pb

_T = TypeVar("_T")
MODEL = pb.GetModelResponse(model=pb.Model(name="vanilla", version=1))


def run(program: Program[_T], *replies: object) -> tuple[list[Call | Pause], _T | RnnserveError]:
    """Gives the replies to the calls of a program; what it did, and what came out."""
    actions, waiting = [], list(replies)
    try:
        action = next(program)
        while True:
            actions.append(action)
            reply = waiting.pop(0) if isinstance(action, Call) else None
            action = program.throw(reply) if isinstance(reply, RnnserveError) else program.send(reply)
    except StopIteration as end:
        result: _T = end.value
        return actions, result
    except RnnserveError as error:
        return actions, error


def pauses(actions: list[Call | Pause]) -> list[float]:
    return [action.duration_s for action in actions if isinstance(action, Pause)]


def calls(timeout_s: float = 30.0, **policy: float) -> Calls:
    return Calls(timeout_s, RetryPolicy(**policy))  # type: ignore[arg-type]


def test_a_server_out_of_reach_is_tried_again() -> None:
    actions, model = run(calls().model("vanilla", 0), Unreachable("down"), Unreachable("down"), MODEL)
    assert isinstance(model, Model)
    assert [type(action) for action in actions] == [Call, Pause, Call, Pause, Call]


def test_the_pauses_grow_at_random_up_to_the_limit() -> None:
    policy = {"attempts": 6, "first_backoff_s": 1.0, "max_backoff_s": 4.0}
    actions, _ = run(calls(60.0, **policy).model("vanilla", 0), *[Unreachable("down")] * 6)
    for pause_s, longest_s in zip(pauses(actions), [1, 2, 4, 4, 4], strict=True):
        assert longest_s / 2 <= pause_s <= longest_s


def test_after_the_last_attempt_the_error_comes_out() -> None:
    actions, error = run(calls(attempts=2).model("vanilla", 0), Unreachable("first"), Unreachable("second"))
    assert str(error) == "second"
    assert len(actions) == 3


def test_one_attempt_is_no_retry() -> None:
    actions, error = run(calls(attempts=1).model("vanilla", 0), Unreachable("down"))
    assert isinstance(error, Unreachable)
    assert pauses(actions) == []


def test_a_full_server_is_not_asked_before_the_time_that_it_named() -> None:
    actions, _ = run(calls().model("vanilla", 0), QueueFull("full", retry_after_s=3.0), MODEL)
    assert pauses(actions)[0] >= 3.0


def test_a_pause_past_the_deadline_is_not_begun() -> None:
    actions, error = run(calls(timeout_s=2.0).model("vanilla", 0), QueueFull("full", retry_after_s=3.0))
    assert isinstance(error, QueueFull)
    assert pauses(actions) == []


@pytest.mark.parametrize("error", [ModelNotFound("gone"), TimedOut("late"), RnnserveError("unknown")])
def test_what_will_not_get_better_is_not_tried_again(error: RnnserveError) -> None:
    actions, result = run(calls().model("vanilla", 0), error)
    assert result is error
    assert len(actions) == 1


def test_all_attempts_share_one_deadline() -> None:
    actions, _ = run(calls(timeout_s=5.0).model("vanilla", 0), Unreachable("down"), MODEL)
    first, _, second = actions
    assert isinstance(first, Call)
    assert isinstance(second, Call)
    assert second.timeout_s < first.timeout_s <= 5.0


def test_models_are_asked_for_page_by_page() -> None:
    first = pb.ListModelsResponse(models=[pb.Model(name="a")], next_page_token="1")
    second = pb.ListModelsResponse(models=[pb.Model(name="b")])
    actions, found = run(calls().models(), first, second)
    requests = [action.request for action in actions if isinstance(action, Call)]
    assert requests == [pb.ListModelsRequest(), pb.ListModelsRequest(page_token="1")]
    assert isinstance(found, list)
    assert [model.name for model in found] == ["a", "b"]


def test_enums_of_the_wire_are_plain_words() -> None:
    message = pb.Model(
        pattern=pb.PATTERN_MANY_TO_MANY_ALIGNED,
        cell=pb.CELL_TANH,
        direction=pb.DIRECTION_BIDIRECTIONAL,
        missing_values=pb.MISSING_VALUES_HOLD_LAST,
    )
    model = model_from(message)
    assert (model.pattern, model.cell, model.direction) == ("many-to-many-aligned", "tanh", "bidirectional")
    assert model.missing_values == "hold-last"


@pytest.mark.parametrize(
    ("pattern", "writes"), [(pb.PATTERN_MANY_TO_MANY_UNALIGNED, True), (pb.PATTERN_MANY_TO_MANY_ALIGNED, False)]
)
def test_a_model_whose_output_has_a_length_of_its_own_is_an_encoder_decoder(
    pattern: pb.Pattern.ValueType, writes: bool
) -> None:
    assert model_from(pb.Model(pattern=pattern)).encoder_decoder == writes


def test_what_is_not_said_is_empty_and_what_is_new_is_its_number() -> None:
    model = model_from(pb.Model.FromString(pb.Model(cell=99).SerializeToString()))  # type: ignore[arg-type]
    assert (model.pattern, model.cell, model.quality, model.training_data) == ("", "99", None, None)


def test_pauses_grow_up_to_the_longest_however_many_attempts_there_are() -> None:
    pauses_s = list(RetryPolicy(attempts=3_000, first_backoff_s=0.1, max_backoff_s=5.0).backoffs_s())
    assert len(pauses_s) == 2_999
    assert 0.05 <= pauses_s[0] <= 0.1
    assert all(2.5 <= pause_s <= 5.0 for pause_s in pauses_s[6:])
