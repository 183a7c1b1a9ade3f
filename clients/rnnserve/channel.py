"""How the client connects."""

import ipaddress
import re
from pathlib import Path

import grpc

TLS = bool | str | Path | bytes | None
"""None or False = plaintext; True = the usual certificate authorities; else a file of CA certificates, or its bytes."""

MAX_RESPONSE_BYTES = 64 * 1024 * 1024

# A server with grpc's defaults takes a ping every 5 minutes at most on a quiet stream, and hangs up on more.
_KEEPALIVE_PERIOD_MS = 330_000
_KEEPALIVE_TIMEOUT_MS = 20_000


def channel_options(target: str) -> list[tuple[str, int]]:
    """Limits, keepalive while calls are open, and quick reconnects. Raises ValueError for a target without a host."""
    if not host_of(target).strip():
        raise ValueError(f"the target {target!r} names no host: it is host:port, such as localhost:50051")
    options = [
        ("grpc.max_receive_message_length", MAX_RESPONSE_BYTES),
        ("grpc.keepalive_time_ms", _KEEPALIVE_PERIOD_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.use_local_subchannel_pool", 1),  # or all channels to a target would share one connection
    ]
    if is_loopback(target):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def checked_connections(connections: int) -> int:
    """The same number. Raises ValueError."""
    if connections < 1:
        raise ValueError(f"connections must be 1 or more, not {connections}")
    return connections


def credentials(tls: TLS) -> grpc.ChannelCredentials | None:
    """None = plaintext."""
    if tls is None or tls is False:
        return None
    if tls is True:
        return grpc.ssl_channel_credentials()
    return grpc.ssl_channel_credentials(tls if isinstance(tls, bytes) else Path(tls).read_bytes())


def call_metadata(target: str, tls: TLS, token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with each call. Raises ValueError where the token would be readable on its way."""
    if token is None:
        return ()
    if not tls and not is_loopback(target):
        raise ValueError(f"a token is sent to {target} only over TLS: pass tls=True or a file of CA certificates")
    return (("authorization", f"Bearer {token}"),)


def is_loopback(target: str) -> bool:
    """Whether a gRPC target names this machine itself; False where in doubt."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = host_of(target)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(target: str) -> str:
    """dns:///localhost:50051 -> localhost; [::1]:50051 -> ::1; another kind of target as it is."""
    address = re.sub(r"^(dns:(//[^/]*/)?|ipv4:|ipv6:)", "", target)
    if address.startswith("["):
        return address[1:].split("]")[0]
    return address.rsplit(":", 1)[0] if address.count(":") == 1 else address
