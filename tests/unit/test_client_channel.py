"""Where a token may go, and how the connection is kept."""

import pytest

from rnnserve import Client
from rnnserve.channel import call_metadata, channel_options, is_loopback

HERE = (
    "localhost localhost:1 127.0.0.1:1 127.9.9.9:1 [::1]:1 ::1 dns:///localhost:1 dns:localhost:1 ipv4:127.0.0.1:1 "
    "ipv6:[::1]:1 unix:/run/rnnserve unix:///run/rnnserve"
)
ELSEWHERE = (
    "example.com:1 10.0.0.1:1 [2001:db8::1]:1 localhost.example.com:1 dns:///example.com:1 "
    "dns://localhost/example.com:1 ipv4:127.0.0.1:1,10.0.0.1:1 xds:///localhost example.com/localhost:1"
)


@pytest.mark.parametrize("target", HERE.split())
def test_this_machine_is_known_by_its_names(target: str) -> None:
    assert is_loopback(target)


@pytest.mark.parametrize("target", ELSEWHERE.split())
def test_other_machines_are_not_taken_for_this_one(target: str) -> None:
    assert not is_loopback(target)


def test_a_token_goes_to_this_machine_and_over_tls_and_nowhere_else() -> None:
    bearer = (("authorization", "Bearer secret"),)
    assert call_metadata("localhost:1", None, "secret") == bearer
    assert call_metadata("example.com:1", True, "secret") == bearer
    assert call_metadata("example.com:1", None, None) == ()
    with pytest.raises(ValueError, match="only over TLS"):
        Client("example.com:1", token="secret")


@pytest.mark.parametrize("target", ["", " ", "dns:///", ":50051"])
def test_a_target_without_a_host_is_refused_at_once(target: str) -> None:
    with pytest.raises(ValueError, match=f"the target '{target}' names no host"):
        Client(target)


def test_pings_are_rare_enough_for_a_server_with_the_usual_limits() -> None:
    options = dict(channel_options("example.com:1"))
    assert options["grpc.keepalive_time_ms"] > 300_000  # grpc's servers hang up on more than one in five minutes
    assert "grpc.keepalive_permit_without_calls" not in options


def test_a_proxy_for_the_internet_is_not_asked_for_this_machine() -> None:
    assert dict(channel_options("localhost:1"))["grpc.enable_http_proxy"] == 0
    assert "grpc.enable_http_proxy" not in dict(channel_options("example.com:1"))
