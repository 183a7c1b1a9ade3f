"""What a supervisor and its workers tell each other: one JSON object a line, over a pair of sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any

MAX_LINE_BYTES = 16 * 2**20  # a page of metrics
Message = dict[str, Any]


class Channel:
    """One end. The other end's death is the end of the messages."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def of(cls, end: socket.socket) -> Channel:
        """Over this socket."""
        end.setblocking(False)
        return cls(*await asyncio.open_connection(sock=end, limit=MAX_LINE_BYTES))

    def send(self, **message: Any) -> None:
        """Does not wait; to whoever is dead it does nothing."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> Message | None:
        """None at the end."""
        try:
            line = await self._reader.readline()
        except OSError:
            return None
        message: Message | None = json.loads(line) if line.endswith(b"\n") else None
        return message

    async def flush(self) -> None:
        """Return once all is with the kernel, as far as anybody reads."""
        with suppress(OSError):
            await self._writer.drain()

    def close(self) -> None:
        self._writer.close()
