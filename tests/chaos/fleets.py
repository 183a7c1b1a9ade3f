"""Several processes that serve as one, and the faults that they may meet.

Workers: three under a supervisor, over one SQLite file. Services: two over one Redis, behind a real Envoy.
"""

from __future__ import annotations

import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from rnnserve import Client, RnnserveError
from tests.support.bundles import write_accumulator, write_test_repository
from tests.support.envoy import envoy
from tests.support.redis_server import RedisServer, start_redis
from tests.support.server import RunningServer, start_server

CALM_S = 0.4  # while a fault of a store or the lane lasts
PAUSE_S = 2.5  # of a process; longer than its lease and than its clients wait
STALE_S = 0.1  # in which a process that wakes up may still try to write
RECOVERY_TIMEOUT_S = 120.0  # of all processes, which are started again after pauses that grow
SETTINGS = {"checkpoint_interval_s": 0.05, "session_lease_s": 1, "worker_timeout_s": 4, "drain_timeout_s": 2}


class Fleet(ABC):
    """Several processes that serve as one, and what can be done to them. A fault returns once it is over."""

    target: str
    interrupting: frozenset[str]
    """Those that end streams."""

    @property
    @abstractmethod
    def faults(self) -> dict[str, Callable[[random.Random], None]]:
        """By name."""

    @abstractmethod
    def recover(self) -> None:
        """Return once all processes serve again."""


class Workers(Fleet):
    """Three under a supervisor, over one SQLite file."""

    interrupting = frozenset({"kill a worker", "stop a worker", "wake a worker, kill the others", "rolling restart"})

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self.target = server.target

    @property
    def faults(self) -> dict[str, Callable[[random.Random], None]]:
        return {
            "kill a worker": lambda drawn: os.kill(drawn.choice(self._pids("worker")), signal.SIGKILL),
            "stop a worker": self._stop,
            "wake a worker, kill the others": self._wake,
            "kill the lane": self._kill_the_lane,
            "rolling restart": self._roll,
        }

    def recover(self) -> None:
        until_s = time.monotonic() + RECOVERY_TIMEOUT_S
        with Client(self.target, timeout_s=2.0) as client:
            while time.monotonic() < until_s:
                with suppress(RnnserveError, OSError):
                    if len(self._pids("worker")) == 3 and client.health() == "serving" and self._all_serve():
                        return
                time.sleep(0.05)
        raise RuntimeError("the workers did not recover")

    def _pids(self, kind: str) -> list[int]:
        return self._server.children(f"service.{kind}")

    def _all_serve(self) -> bool:
        """Each listens: the supervisor's page counts those that do."""
        listening = f":{self._server.port:04X}"
        found = 0
        for pid in self._pids("worker"):
            names = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
            files = [Path(f"/proc/{pid}/net/{kind}") for kind in ("tcp", "tcp6")]
            rows = [line.split() for file in files for line in file.read_text().splitlines()[1:]]
            found += any(r[1].endswith(listening) and r[3] == "0A" and f"socket:[{r[9]}]" in names for r in rows)
        return found == 3

    def _stop(self, drawn: random.Random) -> None:
        """Until the supervisor kills it."""
        pid = drawn.choice(self._pids("worker"))
        os.kill(pid, signal.SIGSTOP)
        while pid in self._pids("worker"):
            time.sleep(0.05)

    def _wake(self, drawn: random.Random) -> None:
        pids = self._pids("worker")
        paused = pids.pop(drawn.randrange(len(pids)))
        _pause(paused)
        time.sleep(drawn.uniform(0.0, STALE_S))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def _kill_the_lane(self, drawn: random.Random) -> None:
        (pid,) = self._pids("lane")
        os.kill(pid, signal.SIGKILL)
        time.sleep(CALM_S)

    def _roll(self, drawn: random.Random) -> None:
        before = self._server.log().count("all workers are new")
        self._server.process.send_signal(signal.SIGHUP)
        until_s = time.monotonic() + RECOVERY_TIMEOUT_S
        while self._server.log().count("all workers are new") == before and time.monotonic() < until_s:
            time.sleep(0.05)


class Services(Fleet):
    """Two over one Redis, behind Envoy."""

    interrupting = frozenset({"kill a service", "pause a service", "wake a service, kill the other"})

    def __init__(self, folder: Path, repository: Path, stack: ExitStack) -> None:
        self._redis: RedisServer = stack.enter_context(start_redis(_made(folder / "redis")))
        self._folder = folder
        self._repository = repository
        self._servers: list[RunningServer] = []
        self._stack = stack
        self._ports: list[int] = []
        for number in range(2):
            self._start(number)
        self.target = stack.enter_context(envoy(folder, self._ports))

    @property
    def faults(self) -> dict[str, Callable[[random.Random], None]]:
        return {
            "kill a service": self._kill,
            "pause a service": lambda drawn: _pause(self._servers[drawn.randrange(2)].process.pid),
            "wake a service, kill the other": self._wake,
            "kill Redis": self._kill_redis,
            "stop Redis": self._stop_redis,
        }

    def recover(self) -> None:
        until_s = time.monotonic() + RECOVERY_TIMEOUT_S
        for server in self._servers:
            with grpc.insecure_channel(server.target) as channel:
                health: Any = HealthStub(channel)
                store = HealthCheckRequest(service="session-store")
                while health.Check(store, wait_for_ready=True).status != HealthCheckResponse.SERVING:
                    if time.monotonic() > until_s:
                        raise RuntimeError("a service did not recover")
                    time.sleep(0.05)

    def _start(self, number: int) -> None:
        state_dir = _made(self._folder / f"service-{number}")
        port = self._ports[number] if number < len(self._ports) else 0
        settings = {**SETTINGS, "session_store": "redis", "redis_url": self._redis.url, "port": port}
        del settings["worker_timeout_s"]
        server = self._stack.enter_context(start_server(self._repository, state_dir, **settings))
        self._servers[number:] = [server, *self._servers[number + 1 :]]
        self._ports[number:] = [server.port, *self._ports[number + 1 :]]

    def _kill(self, drawn: random.Random) -> None:
        self._start_again(drawn.randrange(2))

    def _wake(self, drawn: random.Random) -> None:
        number = drawn.randrange(2)
        _pause(self._servers[number].process.pid)
        time.sleep(drawn.uniform(0.0, STALE_S))
        self._start_again(1 - number)

    def _start_again(self, number: int) -> None:
        self._servers[number].kill()
        self._start(number)

    def _kill_redis(self, drawn: random.Random) -> None:
        self._redis.kill()
        time.sleep(CALM_S)
        self._redis.start()

    def _stop_redis(self, drawn: random.Random) -> None:
        self._redis.stall()
        time.sleep(CALM_S)
        self._redis.go_on()


def _pause(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    os.kill(pid, signal.SIGCONT)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def fleet_of(kind: str, folder: Path) -> Iterator[Fleet]:
    """Started, and ended with the block."""
    repository = folder / "repository"
    write_test_repository(_made(repository))
    write_accumulator(repository)
    with ExitStack() as stack:
        if kind == "services":
            yield Services(folder, repository, stack)
        else:
            state_dir = _made(folder / "state")
            yield Workers(stack.enter_context(start_server(repository, state_dir, workers=3, **SETTINGS)))
