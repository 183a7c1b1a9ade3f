"""The real server, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMITTED_REPOSITORY = ROOT / "models" / "repository"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass
class RunningServer:
    """Where a server listens."""

    process: subprocess.Popen[bytes]
    port: int
    metrics_port: int
    log_file: Path
    terminated: bool = False

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def terminate(self) -> None:
        """Send SIGTERM and return at once."""
        self.terminated = True
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Send SIGTERM if it still runs and has none yet, for a second one kills; the exit code."""
        if self.process.poll() is None and not self.terminated:
            self.terminate()
        return self.process.wait(STOP_TIMEOUT_S)

    def lane_pid(self) -> int:
        """The process for whole sequences. Linux only."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                    return int(child)
        raise RuntimeError("the server has no process for whole sequences")

    def children(self, module: str) -> list[int]:
        """The processes of its supervisor that run this module, such as "service.worker", now. Linux only."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = []
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if f"\0{module}\0" in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(int(pid))
        return found

    def log(self) -> str:
        return self.log_file.read_text()


@contextmanager
def start_server(
    repository: Path = COMMITTED_REPOSITORY, state_dir: Path | None = None, **settings: object
) -> Iterator[RunningServer]:
    """Start `python -m service` on free ports, with settings by name (drain_timeout_s=1); stopped at the end.

    `module` is no setting: it is what runs in place of `service`.
    """
    module = str(settings.pop("module", "service"))
    with tempfile.TemporaryDirectory() as folder:
        state_dir = state_dir or Path(folder)
        (state_dir / "server.json").unlink(missing_ok=True)  # of one that was killed
        given = {"port": 0, "metrics_port": 0, "model_repository": repository, "state_dir": state_dir, **settings}
        variables = {f"RNNSERVE_{name.upper()}": str(value) for name, value in given.items()}
        log_file = state_dir / "server.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", module], cwd=ROOT, env=os.environ | variables, stderr=log)
        try:
            ports = wait_for_ports(process, state_dir / "server.json", log_file)
            server = RunningServer(process, ports["port"], ports["metrics_port"], log_file)
            yield server
            server.stop()
        finally:
            process.kill()
            process.wait()


def wait_for_ports(process: subprocess.Popen[bytes], file: Path, log_file: Path) -> dict[str, int]:
    """The contents of server.json, once the server serves."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError(f"the server did not start:\n{log_file.read_text()}")
        time.sleep(0.02)
    ports: dict[str, int] = json.loads(file.read_text())
    return ports


def free_port() -> int:
    """Nobody listens there."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
