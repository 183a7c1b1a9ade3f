"""From the service's errors to `google.rpc.Status`: one code, one ErrorInfo, and the fitting detail."""

from __future__ import annotations

from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from service import errors

DOMAIN = "rnnserve"

CODES: dict[type[errors.ServingError], int] = {
    errors.Invalid: code_pb2.INVALID_ARGUMENT,
    errors.Conflict: code_pb2.ABORTED,
    errors.NotFound: code_pb2.NOT_FOUND,
    errors.AlreadyExists: code_pb2.ALREADY_EXISTS,
    errors.NotPossible: code_pb2.FAILED_PRECONDITION,
    errors.Exhausted: code_pb2.RESOURCE_EXHAUSTED,
    errors.Unavailable: code_pb2.UNAVAILABLE,
    errors.Failed: code_pb2.INTERNAL,
}


def status_of(error: errors.ServingError) -> status_pb2.Status:
    """What a client is told."""
    code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
    return status_pb2.Status(code=code, message=error.message, details=map(_pack, _details(error)))


def _details(error: errors.ServingError) -> list[message.Message]:
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if isinstance(error, errors.NotPossible):
        subject = error.metadata.get("model", error.metadata.get("setting", ""))
        violation = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason, subject=subject, description=error.message
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[violation]))
    elif error.field is not None:
        field = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[field]))
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s)))
    return details


def duration(seconds: float) -> duration_pb2.Duration:
    """As the contract has it."""
    message = duration_pb2.Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _pack(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
