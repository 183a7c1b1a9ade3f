import re
from collections.abc import Iterator

import pytest
from google.rpc import code_pb2, error_details_pb2

from service import errors
from service.api.statuses import status_of
from service.errors import ServingError
from tests.support.wire import Refusal

CODES = {
    "INVALID_ARGUMENT": {
        "FIELD_INVALID", "OPEN_MISSING", "OPEN_REPEATED", "INPUT_KIND_MISMATCH", "DATA_TYPE_MISMATCH",
        "SHAPE_MISMATCH", "STEPS_MISSING", "TOO_MANY_STEPS", "NOT_FINITE", "UNKNOWN_SYMBOL", "MESSAGE_TOO_LARGE",
        "MESSAGE_MALFORMED", "SNAPSHOT_INVALID",
    },
    "ABORTED": {"STEP_OUT_OF_ORDER", "PART_OVERDUE", "RESUME_POINT_LOST", "SESSION_MOVED", "EVICTED"},
    "NOT_FOUND": {"MODEL_NOT_FOUND", "SESSION_NOT_FOUND"},
    "ALREADY_EXISTS": {"SESSION_EXISTS"},
    "FAILED_PRECONDITION": {
        "MODEL_NOT_STREAMABLE", "MODEL_NOT_GENERATIVE", "BUNDLE_INVALID", "BUNDLE_MISMATCH", "MODEL_IN_USE",
        "NOT_ENABLED",
    },
    "RESOURCE_EXHAUSTED": {"SESSION_LIMIT", "QUEUE_FULL", "DISK_FULL"},
    "UNAVAILABLE": {"DRAINING", "LANE_LOST", "STORE_UNAVAILABLE"},
    "INTERNAL": {"EXECUTION_FAILED", "INTERNAL"},
}  # fmt: skip
"""The contract with clients: renaming a reason or changing its code breaks them."""


def below(kind: type[ServingError]) -> Iterator[type[ServingError]]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


ALL = sorted(below(ServingError), key=lambda kind: kind.__name__)
LEAVES = [kind for kind in ALL if not kind.__subclasses__()]


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_has_its_code_and_exactly_one_error_info(kind: type[ServingError]) -> None:
    status = status_of(kind("a sentence", place="here", count=3))
    refusal = Refusal(status)
    assert refusal.reason in CODES[code_pb2.Code.Name(status.code)]
    assert refusal.message == "a sentence"
    assert refusal.metadata == {"place": "here", "count": "3"}


def test_every_reason_of_the_contract_has_one_error() -> None:
    reasons = [kind("").reason for kind in LEAVES]
    assert sorted(reasons) == sorted(set().union(*CODES.values()))
    assert errors.reasons() == sorted(reasons)


def test_a_wrong_field_is_named_in_a_bad_request() -> None:
    refusal = Refusal(status_of(errors.ShapeMismatch("too wide", field="steps.tensor.shape")))
    assert (refusal.field, refusal.precondition, refusal.retry_after_s) == ("steps.tensor.shape", False, None)


def test_what_a_model_can_never_do_is_a_precondition_failure_about_the_model() -> None:
    refusal = Refusal(status_of(errors.ModelNotStreamable("it reads both ways", model="speaker")))
    (violation,) = refusal.violation.violations
    assert violation == error_details_pb2.PreconditionFailure.Violation(
        type="MODEL_NOT_STREAMABLE", subject="speaker", description="it reads both ways"
    )


@pytest.mark.parametrize("kind", [errors.QueueFull, errors.SessionLimit, errors.Draining, errors.LaneLost])
def test_when_to_come_back_is_told_to_the_millisecond(kind: type[ServingError]) -> None:
    assert Refusal(status_of(kind("later", retry_after_s=2.125))).retry_after_s == 2.125


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, set[str]] = {}
    parent = ""
    for line in (errors.__doc__ or "").splitlines():
        names = re.sub(r"[│├└─]", " ", line)
        if re.match(r"[├└]── ", line):
            parent = names.split()[0]
            drawn[parent] = set()
        elif re.match(r"(│|\s)\s+[├└]── ", line):
            drawn[parent] |= set(re.findall(r"\w+", names))
    assert drawn == {
        group.__name__: {kind.__name__ for kind in group.__subclasses__()} for group in ServingError.__subclasses__()
    }


def test_what_echoes_a_huge_request_stays_small_enough_for_the_end_of_a_call() -> None:
    """Transports refuse trailers of more than 8 kB, and with them the reason."""
    huge = "ü" * 100_000
    status = status_of(errors.ModelNotFound(f"there is no model {huge!r}", field="model", model=huge))
    assert status.ByteSize() < 4_000
    assert Refusal(status).message.startswith("there is no model 'üü")
