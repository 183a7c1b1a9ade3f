"""A real Redis, in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.server import free_port

START_TIMEOUT_S = 20.0
needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no redis-server")


class RedisServer:
    """Keeps its files in a folder; what it acknowledges is on the disk."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self._folder = folder
        self._settings = {"appendonly": "yes", "appendfsync": "always", "save": ""} | settings
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Return once it answers; on the same port and folder each time."""
        given = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self._folder)} | self._settings
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(["redis-server", *words], stdout=log, stderr=log)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"redis-server did not start:\n{(self._folder / 'redis.log').read_text()}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stall(self) -> None:
        """It is there, and does nothing."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False


@contextmanager
def start_redis(folder: Path, **settings: str) -> Iterator[RedisServer]:
    """With settings by name (maxmemory_policy="allkeys-lru"); ended at the end."""
    server = RedisServer(folder, **settings)
    try:
        server.start()
        yield server
    finally:
        server.kill()
