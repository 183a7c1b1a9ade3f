"""What the client says of a server that it does not reach. What grpc says of it was copied from grpc 1.8x."""

import grpc
import pytest

from rnnserve import Unreachable
from rnnserve.statuses import error_from_call

NOBODY = "failed to connect to all addresses; last error: UNKNOWN: "
HANDSHAKE = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:100000f7:SSL routines:OPENSSL_internal:"
UNRESOLVED = "errors resolving there: [field:hostname lookup error:"


class Unavailable(grpc.RpcError):
    """What grpc raises."""

    def __init__(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    ("details", "said"),
    [
        (f"{NOBODY}ipv4:127.0.0.1:1: Failed to connect: Connection refused", "no server answers at there (Connection "),
        (f"{UNRESOLVED}address lookup failed for there: Domain name not found]", "no server answers at there (Domain "),
        (f"{UNRESOLVED}Failed to parse port in name: a:b]", "no server answers at there (Failed to parse port in name"),
        (
            f"{NOBODY}ipv4:127.0.0.1:1: {HANDSHAKE}WRONG_VERSION_NUMBER: Invalid certificate verification context: OK",
            "TLS with there failed: what answers there does not speak it; connect without TLS",
        ),
        (
            f"{NOBODY}ipv4:127.0.0.1:1: {HANDSHAKE}CERTIFICATE_VERIFY_FAILED: self signed certificate: OK",
            "TLS with there failed (CERTIFICATE_VERIFY_FAILED: self signed certificate)",
        ),
        (
            f"{NOBODY}ipv4:127.0.0.1:1: Custom verification check failed with error: UNAUTHENTICATED: "
            "Hostname Verification Check failed.",
            "TLS with there failed (Hostname Verification Check failed)",
        ),
    ],
)
def test_why_a_server_is_out_of_reach_is_said_without_the_layers_of_grpc(details: str, said: str) -> None:
    error = error_from_call(Unavailable(details), "there")
    assert isinstance(error, Unreachable)
    assert error.message.startswith(said)
    assert "]" not in error.message
