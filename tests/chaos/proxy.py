"""A TCP proxy between client and server, which loses the connection in every way a network can."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

CONNECT_TIMEOUT_S = 2.0
CHUNK_BYTES = 65_536
HTTP2_FRAME_HEADER_BYTES = 9

Direction = Literal["up", "down"]
"""up = from the client to the server."""
BOTH: tuple[Direction, Direction] = ("up", "down")


class Proxy:
    """Listens on a port of its own on loopback for as long as it lives; the target may change."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.forwarded_bytes: dict[Direction, int] = {"up": 0, "down": 0}
        self._lock = threading.Condition()
        self._held: set[Direction] = set()
        self._links: set[_Link] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def hold(self, directions: Iterable[Direction]) -> None:
        """Make exactly these a black hole: bytes are received and kept. Later connections are held, too."""
        with self._lock:
            self._held = set(directions)
            self._lock.notify_all()

    def release(self) -> None:
        """Forward what was held, and everything from now on."""
        with self._lock:
            self._held = set()
            self._lock.notify_all()

    def delay(self, duration_s: float) -> None:
        """Hold both directions for a while, then release them; returns at once."""
        self.hold(BOTH)
        timer = threading.Timer(duration_s, self.release)
        timer.daemon = True
        timer.start()

    def cut(self) -> None:
        """End all connections on both sides; what was held is lost."""
        with self._lock:
            links, self._links = self._links, set()
        for link in links:
            link.close()

    def half_close(self, direction: Direction) -> None:
        """End one direction: its receiver reads the end of the stream, and what follows is dropped."""
        with self._lock:
            for link in self._links:
                link.half_close(direction)

    def wait_for_message(self, timeout_s: float) -> bool:
        """Whether a message of the client (an HTTP/2 data frame) is held by then."""
        with self._lock:
            return self._lock.wait_for(lambda: any(_has_data_frame(link.kept["up"]) for link in self._links), timeout_s)

    def close(self) -> None:
        """Listens no more, and ends all connections."""
        self._listener.close()
        self.release()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port), CONNECT_TIMEOUT_S)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, server)
            with self._lock:
                self._links.add(link)
            for direction in BOTH:
                threading.Thread(target=self._receive, args=(link, direction), name="proxy-in", daemon=True).start()
                threading.Thread(target=self._forward, args=(link, direction), name="proxy-out", daemon=True).start()

    def _receive(self, link: _Link, direction: Direction) -> None:
        source = link.client if direction == "up" else link.server
        chunk = b"-"
        while chunk:
            try:
                chunk = source.recv(CHUNK_BYTES)
            except OSError:
                chunk = b""
            with self._lock:
                link.kept[direction] += chunk
                if not chunk:
                    link.ended.add(direction)
                self._lock.notify_all()

    def _forward(self, link: _Link, direction: Direction) -> None:
        """Also forwards the end, but like everything only where nothing is held."""
        sink = link.server if direction == "up" else link.client
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: (
                        link.closed
                        or (direction not in self._held and (link.kept[direction] or direction in link.ended))
                    )
                )
                chunk = bytes(link.kept[direction])
                link.kept[direction].clear()
                if link.closed:
                    return
                dropped = direction in link.dropped
                if not chunk:
                    self._links.discard(link)
            if not chunk:
                link.close()
                return
            if dropped:
                continue
            try:
                sink.sendall(chunk)
            except OSError:
                link.close()
                return
            with self._lock:
                self.forwarded_bytes[direction] += len(chunk)


class _Link:
    """A connection of the client and the one to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.kept: dict[Direction, bytearray] = {"up": bytearray(), "down": bytearray()}
        self.ended: set[Direction] = set()
        self.dropped: set[Direction] = set()
        self.closed = False

    def half_close(self, direction: Direction) -> None:
        self.dropped.add(direction)
        with suppress(OSError):
            (self.server if direction == "up" else self.client).shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.closed = True
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
            end.close()


def _has_data_frame(held: bytearray) -> bool:
    """Holding began between two frames."""
    place = 0
    while place + HTTP2_FRAME_HEADER_BYTES <= len(held):
        length, kind = int.from_bytes(held[place : place + 3], "big"), held[place + 3]
        if kind == 0 and length and place + HTTP2_FRAME_HEADER_BYTES + length <= len(held):
            return True
        place += HTTP2_FRAME_HEADER_BYTES + length
    return False
