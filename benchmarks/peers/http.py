"""HTTP as mosec speaks it."""

from __future__ import annotations

import asyncio


def body_of(received: bytes) -> bytes | None:
    """Of a response; None while a part of it is still to come. Raises RuntimeError if it is not 200."""
    head, blank, body = received.partition(b"\r\n\r\n")
    if not blank:
        return None
    status, *fields = head.lower().split(b"\r\n")
    (length,) = (int(field.partition(b":")[2]) for field in fields if field.startswith(b"content-length:"))
    if len(body) < length:
        return None
    if b" 200 " not in status + b" ":
        raise RuntimeError(f"not an answer: {status + b' ' + body!r}")
    return body


class Connection(asyncio.Protocol):
    """Stays open; a request may go out once the last one is answered."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._received = b""

    async def open(self) -> None:
        host, _, port = self._target.partition(":")
        loop = asyncio.get_running_loop()
        self._answered = loop.create_future()
        self._transport, _ = await loop.create_connection(lambda: self, host, int(port))

    def request_with(self, body: bytes) -> bytes:
        """What to write."""
        head = f"POST /inference HTTP/1.1\r\nHost: {self._target}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def write(self, request: bytes) -> None:
        self._transport.write(request)

    async def answer(self) -> bytes:
        """The body of the next. Raises RuntimeError if it is not 200, or if the connection is lost."""
        body: bytes = await self._answered
        self._answered = asyncio.get_running_loop().create_future()
        return body

    async def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            body = body_of(self._received)
        except RuntimeError as refusal:
            self._answered.set_exception(refusal)
            return
        if body is not None:
            self._received = b""
            self._answered.set_result(body)

    def connection_lost(self, _: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_exception(RuntimeError("mosec has closed the connection"))
            self._answered.exception()  # nobody may be waiting


class Connections:
    """As many as there are requests under way, kept for the next ones."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._all: list[Connection] = []
        self._idle: list[Connection] = []

    async def post(self, body: bytes) -> bytes:
        """The body of the answer. Raises RuntimeError as Connection does, OSError if there is no server."""
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = Connection(self._target)
            await connection.open()
            self._all.append(connection)
        connection.write(connection.request_with(body))
        answer = await connection.answer()
        self._idle.append(connection)
        return answer

    async def close(self) -> None:
        for connection in self._all:
            await connection.close()
