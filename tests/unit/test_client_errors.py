"""What the server refuses becomes an exception named after the reason."""

import pickle

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

import rnnserve
from rnnserve.errors import BY_REASON, InvalidArgument, RnnserveError, TryAgain, reason_of
from rnnserve.statuses import error_from_call, error_from_status

REASONS = {
    "INVALID_ARGUMENT": (
        "OPEN_MISSING OPEN_REPEATED FIELD_INVALID INPUT_KIND_MISMATCH DATA_TYPE_MISMATCH SHAPE_MISMATCH STEPS_MISSING "
        "TOO_MANY_STEPS NOT_FINITE UNKNOWN_SYMBOL MESSAGE_TOO_LARGE MESSAGE_MALFORMED SNAPSHOT_INVALID"
    ),
    "ABORTED": "STEP_OUT_OF_ORDER PART_OVERDUE SESSION_MOVED",
    "NOT_FOUND": "MODEL_NOT_FOUND SESSION_NOT_FOUND",
    "ALREADY_EXISTS": "SESSION_EXISTS",
    "FAILED_PRECONDITION": (
        "MODEL_NOT_STREAMABLE MODEL_NOT_GENERATIVE EVICTED RESUME_POINT_LOST BUNDLE_INVALID BUNDLE_MISMATCH "
        "MODEL_IN_USE NOT_ENABLED"
    ),
    "RESOURCE_EXHAUSTED": "SESSION_LIMIT QUEUE_FULL DISK_FULL",
    "UNAVAILABLE": "DRAINING LANE_LOST STORE_UNAVAILABLE",
    "INTERNAL": "EXECUTION_FAILED INTERNAL",
}
CASES = [(reason, code) for code, reasons in REASONS.items() for reason in reasons.split()]


def status(code: str, message: str = "", *details: Message) -> Status:
    packed = []
    for detail in details:
        packed.append(Any())
        packed[-1].Pack(detail)
    return Status(code=grpc.StatusCode[code].value[0], message=message, details=packed)


def info(reason: str, domain: str = "rnnserve", **metadata: str) -> ErrorInfo:
    return ErrorInfo(reason=reason, domain=domain, metadata=metadata)


class FailedCall(grpc.RpcError):
    """What grpc raises."""

    def __init__(self, code: grpc.StatusCode, details: str = "", metadata: tuple[tuple[str, bytes | str], ...] = ()):
        self._parts = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(  # type: ignore[override]
        self,
    ) -> tuple[tuple[str, bytes | str], ...]:
        return self._parts[2]


@pytest.mark.parametrize(("reason", "code"), CASES)
def test_each_reason_raises_the_class_of_its_name(reason: str, code: str) -> None:
    error = error_from_status(status(code, "why", info(reason)))
    assert type(error).__name__ == reason.title().replace("_", "")
    assert (error.reason, error.code, str(error)) == (reason, code, "why")
    assert isinstance(error, InvalidArgument) == (code == "INVALID_ARGUMENT")
    assert isinstance(error, TryAgain) == (code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"))


def test_the_table_of_classes_is_complete_and_exported() -> None:
    assert set(BY_REASON) == {reason for reason, _ in CASES}
    for reason, error_class in BY_REASON.items():
        assert reason_of(error_class) == reason
        assert getattr(rnnserve, error_class.__name__) is error_class


def test_an_error_brings_the_facts_of_its_details() -> None:
    bad_request = BadRequest(field_violations=[BadRequest.FieldViolation(field="steps.first_step")])
    retry = RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    error = error_from_status(
        status("ABORTED", "gap", info("STEP_OUT_OF_ORDER", expected_step="7"), bad_request, retry)
    )
    assert (error.metadata, error.field, error.retry_after_s) == ({"expected_step": "7"}, "steps.first_step", 1.5)


def test_an_error_without_details_has_no_facts() -> None:
    error = error_from_status(status("ABORTED", "gap", info("STEP_OUT_OF_ORDER")))
    assert (error.metadata, error.field, error.retry_after_s, error.index) == ({}, None, None, None)


def test_a_reason_of_a_newer_server_is_the_root_with_that_reason() -> None:
    error = error_from_status(status("INTERNAL", "new", info("BRAND_NEW")))
    assert type(error) is RnnserveError
    assert error.reason == "BRAND_NEW"


def test_a_reason_of_another_domain_is_not_taken_for_ours() -> None:
    error = error_from_status(status("NOT_FOUND", "gone", info("MODEL_NOT_FOUND", domain="example.com")))
    assert type(error) is RnnserveError
    assert error.reason == ""


def test_a_failed_call_with_a_status_in_its_trailers_is_read_from_there() -> None:
    trailer = status("NOT_FOUND", "no such model", info("MODEL_NOT_FOUND")).SerializeToString()
    call = FailedCall(grpc.StatusCode.NOT_FOUND, "", (("other", "x"), ("grpc-status-details-bin", trailer)))
    assert isinstance(error_from_call(call, "here:1"), rnnserve.ModelNotFound)


def test_a_broken_trailer_leaves_the_code_and_the_message() -> None:
    call = FailedCall(grpc.StatusCode.NOT_FOUND, "gone", (("grpc-status-details-bin", b"\xff\xff"),))
    error = error_from_call(call, "here:1")
    assert (type(error), error.code, str(error)) == (RnnserveError, "NOT_FOUND", "gone")


def test_no_connection_is_unreachable_and_says_where_and_what_to_do() -> None:
    error = error_from_call(FailedCall(grpc.StatusCode.UNAVAILABLE, "a: b: Connection refused"), "here:1")
    assert isinstance(error, rnnserve.Unreachable)
    assert "here:1 (Connection refused)" in str(error)
    assert "python -m service" in str(error)


def test_a_deadline_is_timed_out() -> None:
    error = error_from_call(FailedCall(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"), "here:1")
    assert isinstance(error, rnnserve.TimedOut)


def test_an_error_survives_the_way_between_processes() -> None:
    error = error_from_status(status("NOT_FOUND", "no such model", info("MODEL_NOT_FOUND", model="x")))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.metadata) == (rnnserve.ModelNotFound, "no such model", {"model": "x"})
