"""The server under test, as the harness sees it: start, kill, stop, limit, and the points it can be halted at."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.chaos.broken import VARIABLE as BREAK_VARIABLE
from tests.chaos.server_with_points import CONTROL_VARIABLE, Armed
from tests.support.server import ROOT, free_port

START_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 10.0
POLL_S = 0.005


class ChaosServer:
    """One port and one state folder; the process behind them may be another after each fault."""

    def __init__(self, repository: Path, state_dir: Path, break_name: str = "") -> None:
        self.state_dir = state_dir
        self.port = free_port()
        self.reached: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.store_failures = 0
        """Writes of the store that failed, in all processes so far."""
        self._pid = 0
        self._control: socket.socket | None = None
        self._answers: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(START_TIMEOUT_S)
        path = state_dir / "control"
        self._listener.bind(str(path))
        self._listener.listen()
        given = {
            "port": self.port,
            "metrics_port": 0,
            "model_repository": repository,
            "state_dir": state_dir,
            "checkpoint_interval_s": 0.05,
            "drain_timeout_s": 1,
        }
        variables = {f"RNNSERVE_{name.upper()}": str(value) for name, value in given.items()}
        variables |= {CONTROL_VARIABLE: str(path), BREAK_VARIABLE: break_name}
        self._log = (state_dir / "server.log").open("ab")
        self._starter = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.server_with_points"],
            cwd=ROOT,
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.start()

    def start(self) -> None:
        """Return once it serves."""
        announced = self.state_dir / "server.json"
        announced.unlink(missing_ok=True)
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        self._starter.stdin.write(b"start\n")
        self._starter.stdin.flush()
        self._pid = int(self._starter.stdout.readline())
        self._control, _ = self._listener.accept()
        threading.Thread(target=self._listen, args=(self._control,), name="control", daemon=True).start()
        _wait_until(announced.exists, START_TIMEOUT_S, f"the server did not start, see {self.state_dir}/server.log")

    def wait_for_store(self) -> None:
        """After a fault of it; what is opened before is not promised to survive a crash."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub: Any = HealthStub(channel)
            store = HealthCheckRequest(service="session-store")
            _wait_until(
                lambda: stub.Check(store, wait_for_ready=True).status == HealthCheckResponse.SERVING,
                ANSWER_TIMEOUT_S,
                "the store does not come back",
            )

    def arm(self, armed: Armed | None) -> None:
        """From now on it halts there, once."""
        self._send(arm=vars(armed) if armed else None)
        try:
            self._answers.get(timeout=ANSWER_TIMEOUT_S)
        except Empty:
            raise RuntimeError("the server does not answer the harness") from None

    def go(self) -> None:
        """Let it go on where it waits at a point."""
        self._send(go=True)

    def kill(self) -> None:
        """End it as a crash would, if it has not ended itself."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        _wait_until(lambda: not os.path.exists(f"/proc/{self._pid}"), ANSWER_TIMEOUT_S, "the server did not end")

    def stop(self) -> None:
        """No instruction more until `resume`."""
        os.kill(self._pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Nothing can be written to a file."""
        soft, hard = resource.prlimit(self._pid, resource.RLIMIT_FSIZE)
        pid = self._pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

    @contextmanager
    def locked_database(self) -> Iterator[None]:
        """Another process writes, and takes its time."""
        connection = sqlite3.connect(self.state_dir / "sessions.sqlite", timeout=5.0, isolation_level=None)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            yield
            connection.execute("ROLLBACK")
        finally:
            connection.close()

    def close(self) -> None:
        """End all processes that were started here."""
        assert self._starter.stdin is not None
        self._starter.stdin.close()
        try:
            self._starter.wait(ANSWER_TIMEOUT_S)
        finally:
            self._starter.kill()
            self._starter.wait()
            assert self._starter.stdout is not None
            self._starter.stdout.close()
            self._listener.close()
            self._log.close()

    def _send(self, **message: object) -> None:
        assert self._control is not None
        self._control.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, control: socket.socket) -> None:
        try:
            with control, control.makefile() as lines:
                for line in lines:
                    message = json.loads(line)
                    if "reached" in message:
                        self.reached.put(message)
                    elif "store_failed" in message:
                        self.store_failures += 1
                    elif "armed" in message:
                        self._answers.put(message)
        except OSError:
            pass  # it was killed


def _wait_until(condition: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            raise RuntimeError(otherwise)
        time.sleep(POLL_S)
