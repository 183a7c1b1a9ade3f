"""Reads what went wrong out of a google.rpc.Status or a failed gRPC call."""

import re
from collections.abc import Iterable
from typing import TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from rnnserve.errors import BY_REASON, MessageTooLarge, RnnserveError, StreamClosed, TimedOut, Unreachable

_M = TypeVar("_M", bound=Message)

DOMAIN = "rnnserve"
_DETAILS_KEY = "grpc-status-details-bin"
_UNRESOLVED = re.compile(r"hostname lookup error:(?:address lookup failed for .*?: )?(.*)\]$")
_TLS_FAILED = re.compile(r"(?:OPENSSL_internal:|verification check failed with error: \w+: )(.*?)\.?(?:: OK)?$")
_CODE_NAMES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def error_from_status(status: Status) -> RnnserveError:
    """The exception that a status stands for; RnnserveError itself where the reason is unknown."""
    info = _detail(status, ErrorInfo()) or ErrorInfo()
    retry = _detail(status, RetryInfo())
    bad_request = _detail(status, BadRequest())
    reason = info.reason if info.domain == DOMAIN else ""
    return BY_REASON.get(reason, RnnserveError)(
        status.message,
        reason=reason,
        code=_CODE_NAMES.get(status.code, str(status.code)),
        metadata=info.metadata,
        retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        field=bad_request.field_violations[0].field if bad_request and bad_request.field_violations else None,
    )


def error_from_call(error: grpc.RpcError, target: str) -> RnnserveError:
    """The exception that a failed call stands for."""
    call = cast(grpc.Call, error)  # every error that grpc's clients raise is one, but its types do not say so
    status = _status_in(call.trailing_metadata() or ())
    if status is not None:
        return error_from_status(status)
    return _error_without_details(call.code(), call.details() or "", target)


def timed_out(target: str, timeout_s: float | None = None) -> TimedOut:
    """The exception for an answer that did not come in time."""
    within = "in time" if timeout_s is None else f"within {timeout_s:g} s"
    return TimedOut(f"no answer from {target} {within}", reason="TIMED_OUT", code="DEADLINE_EXCEEDED")


def ended_by_server(target: str) -> StreamClosed:
    """The exception for a stream that is over though nobody closed it."""
    return StreamClosed(f"{target} has ended the stream", reason="STREAM_CLOSED", code="OK")


def cancelled_here() -> StreamClosed:
    """The exception for a stream that was ended on this side while it was in use."""
    return StreamClosed("the stream was cancelled", reason="STREAM_CLOSED", code="CANCELLED")


def not_open() -> StreamClosed:
    """The exception for a stream that is used outside of its `with` block."""
    return StreamClosed("the stream is not open: use it in its `with` block", reason="STREAM_CLOSED")


def _error_without_details(code: grpc.StatusCode, details: str, target: str) -> RnnserveError:
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(_why_unreachable(details, target), reason="UNREACHABLE", code=code.name)
    was_cancelled = code is grpc.StatusCode.CANCELLED and details == code.name
    if was_cancelled or "RST_STREAM" in details:  # by neither of us: the stream was reset on its way
        return Unreachable(f"the call to {target} was cut off", reason="UNREACHABLE", code=code.name)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return timed_out(target)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in details:
        return MessageTooLarge(details, reason="MESSAGE_TOO_LARGE", code=code.name)  # the transport's own limit
    return RnnserveError(details or f"the call to {target} failed", code=code.name)


def _why_unreachable(details: str, target: str) -> str:
    tls = _TLS_FAILED.search(details)
    if tls and "WRONG_VERSION_NUMBER" in tls[1]:
        return f"TLS with {target} failed: what answers there does not speak it; connect without TLS"
    if tls:
        return f"TLS with {target} failed ({tls[1]})"
    return (
        f"no server answers at {target} ({_cause(details)}); start one with `python -m service`, or name another target"
    )


def _cause(details: str) -> str:
    """Without the names of grpc's own layers, which it puts around it."""
    unresolved = _UNRESOLVED.search(details)
    return unresolved[1] if unresolved else details.rsplit(": ", 1)[-1]


def _status_in(metadata: Iterable[tuple[str, str | bytes]]) -> Status | None:
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return Status.FromString(value)
            except DecodeError:
                return None
    return None


def _detail(status: Status, kind: _M) -> _M | None:
    """The first detail of the kind of the (empty) message `kind`."""
    return next((kind for packed in status.details if packed.Unpack(kind)), None)
