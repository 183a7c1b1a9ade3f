"""How one process of a machine tells another that it wants a session: a datagram on the loopback device."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgpack

from service.sessions.record import SessionKey
from service.sessions.stores.shared import Wanted

HOST = "127.0.0.1"


class Wants(asyncio.DatagramProtocol):
    """Hears only those who know the secret, which stands in the store beside the port."""

    def __init__(self, secret: bytes, on_wanted: Callable[[Wanted], None]) -> None:
        self.secret = secret
        self.port = 0
        self._on_wanted = on_wanted
        self._transport: asyncio.DatagramTransport | None = None

    async def open(self) -> None:
        """Listen. Raises OSError."""
        self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: self, local_addr=(HOST, 0)
        )
        self.port = self._transport.get_extra_info("sockname")[1]

    def tell(self, port: int, secret: bytes, wanted: Wanted) -> None:
        """Whoever is not there hears nothing."""
        if self._transport is not None:
            self._transport.sendto(msgpack.packb((secret, *wanted.key, wanted.deleted)), (HOST, port))

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:  # noqa: ARG002
        with suppress(ValueError, TypeError, msgpack.UnpackException):  # not one of ours
            secret, tenant, session_id, deleted = msgpack.unpackb(data)
            if hmac.compare_digest(secret, self.secret):
                self._on_wanted(Wanted(SessionKey(str(tenant), str(session_id)), bool(deleted)))

    def close(self) -> None:
        """Hear no more."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None
