"""A real Redis, in a process of its own."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.server import free_port

REDIS = shutil.which("redis-server")
START_TIMEOUT_S = 20.0


class RedisServer:
    """Keeps what it has confirmed, in its folder."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.port = free_port()
        self._folder = folder
        self._settings = {"appendonly": "yes", "appendfsync": "always", "save": ""} | settings
        self.start()

    @property
    def url(self) -> str:
        password = self._settings.get("requirepass", "")
        return f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Return once it answers."""
        settings = [word for name, value in self._settings.items() for word in (f"--{name}", value)]
        command = [str(REDIS), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), *settings]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if time.monotonic() > until_s or self._process.poll() is not None:
                raise RuntimeError("redis-server did not start")
            time.sleep(0.01)

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


@contextmanager
def redis_server(folder: Path, **settings: str) -> Iterator[RedisServer]:
    """Ends with the block."""
    server = RedisServer(folder, **settings)
    try:
        yield server
    finally:
        server.kill()
