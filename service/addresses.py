"""Whether addresses can be had, said in sentences. gRPC writes lines of its own and says only that they cannot."""

from __future__ import annotations

import errno
import socket
from typing import Any


class StartError(RuntimeError):
    """The service cannot start; the message says why in a sentence."""


def check_address(host: str, port: int) -> None:
    """Raises StartError."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise StartError(f"host: {host!r} cannot be resolved") from None
    errors = [error for family, *_, address in addresses if (error := _try_to_bind(family, address))]
    if len(errors) == len(addresses):  # gRPC, too, is content with one that works
        field, what = ("host", host) if errors[0].errno == errno.EADDRNOTAVAIL else ("port", f"{port} on {host}")
        raise StartError(f"{field}: {what} {why_not_bound(errors[0])}")


def reserve_shared_port(host: str, port: int) -> socket.socket:
    """A socket that keeps a port, which processes with SO_REUSEPORT can then listen on. Raises StartError.

    The kernel lets any process of the same user share it, so whether it is free has to be asked before.
    """
    check_address(host, port)
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    reserved = socket.socket(family)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
    except OSError as error:
        reserved.close()
        raise StartError(f"port: {port} on {host} {why_not_bound(error)}") from None
    return reserved


def why_not_bound(error: OSError) -> str:
    """The end of a sentence about the address."""
    if error.errno == errno.EADDRINUSE:
        return "is in use by another program"
    if error.errno == errno.EADDRNOTAVAIL:
        return "is no address of this machine"
    return f"cannot be bound: {error.strerror}"


def _try_to_bind(family: socket.AddressFamily, address: tuple[Any, ...]) -> OSError | None:
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind(address)
    except OSError as error:
        return error
    return None
