"""`python -m tests.chaos.fleet --plans 200 --on workers`: faults of whole processes, while several streams are at work.

On workers: three under a supervisor, over one SQLite file. On services: two over one Redis, behind a real Envoy. Each
plan is one fault in the midst of several streams of whole numbers, which the server sums exactly; it counts if it broke
off a stream that waited for an answer, or, where the fault is none of the streams', if they went on while it lasted. In
every third plan several clients want one of the sessions at once, and one must have it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rnnserve import Client, Notice, ResumePoint, RnnserveError, SessionMoved, Stream, TimedOut, TryAgain
from tests.chaos import broken
from tests.support.bundles import accumulated, write_accumulator, write_test_repository
from tests.support.envoy import envoy
from tests.support.redis_server import RedisServer, start_redis
from tests.support.server import RunningServer, start_server

STREAMS = 4
STEPS = 60
PACE_S = 0.01
SLOW_PACE_S = (
    0.05  # of a stream that only waits for the end of a fault, so that its sums stay exact however long that is
)
CALM_S = 0.4  # while a fault of a store or the lane lasts
PAUSE_S = 2.5  # of a process; longer than its lease and than its clients wait
STALE_S = 0.1  # in which a process that wakes up may still try to write
TIMEOUT_S = 40.0
RECOVERY_TIMEOUT_S = 120.0  # of all processes, which are started again after pauses that grow
RIVALS = 3
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


@dataclass
class Worked:
    """What came of a stream."""

    seed: int
    number: int
    rows: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    interrupted: bool = False
    error: BaseException | None = None

    def value(self, index: int) -> float:
        """Of a step; small, so that the sums of sums stay exact (below 2^24) over some thousand steps."""
        return float((self.seed * 31 + self.number * 17 + index * index * 7) % 3)


@dataclass
class Outcome:
    """What came of a plan."""

    seed: int
    fault: str
    hit: bool = False
    steps: int = 0
    recovery_s: float = 0.0
    violations: list[str] = field(default_factory=list)


def run_plan(fleet: Fleet, seed: int) -> Outcome:
    """One fault in the midst of several streams; every third time one of them changes hands meanwhile, in a race."""
    drawn = random.Random(seed)
    names = list(fleet.faults)
    outcome = Outcome(seed, names[seed % len(names)])
    fleet.recover()
    worked = [Worked(seed, number) for number in range(STREAMS)]
    strike_at, over = drawn.randrange(STEPS // 4, STEPS // 2), threading.Event()
    with ThreadPoolExecutor(STREAMS) as threads:
        done = [threads.submit(_work, fleet.target, one, over, moves=seed % 3 == 0 == one.number) for one in worked]
        while any(len(one.rows) < strike_at and one.error is None for one in worked):
            time.sleep(0.001)
        before, struck_s = [len(one.rows) for one in worked], time.monotonic()
        try:
            fleet.faults[outcome.fault](drawn)
        finally:
            over.set()
        outcome.hit = any(len(one.rows) > then for one, then in zip(worked, before, strict=True))
        for work in done:
            work.result(TIMEOUT_S)
    outcome.recovery_s = max(_longest_gap_s(one, struck_s) for one in worked)
    if outcome.fault in fleet.interrupting:
        outcome.hit = any(one.interrupted for one in worked)
    for one in worked:
        outcome.steps += len(one.rows)
        outcome.violations += [f"stream {one.number}: {problem}" for problem in _problems(one)]
    return outcome


def _work(target: str, worked: Worked, over: threading.Event, *, moves: bool) -> None:
    """Steps until the fault is over, and at least so many. If it moves, another client takes it over half-way."""

    def told(notice: Notice) -> None:
        worked.interrupted |= notice.reason in ("interrupted", "draining")

    def step(stream: Stream, end: int | None) -> None:
        for answer in stream.steps(_inputs(worked, stream.next_step, end, over), ahead=4):
            worked.rows.append((answer.step, tuple(answer.output.tolist())))
            worked.times_s.append(time.monotonic())

    try:
        with Client(target, timeout_s=1.0, resume_timeout_s=TIMEOUT_S) as client:
            stream = client.stream("accumulator", session=f"fleet-{worked.seed}-{worked.number}", on_notice=told)
            stream.open()
            step(stream, STEPS // 2 if moves else None)
            if moves:
                _move(stream, target, worked, step)
            else:
                stream.close()
    except BaseException as error:
        worked.error = error


def _inputs(
    worked: Worked, first: int, end: int | None, over: threading.Event
) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    for index in itertools.count(first):
        if index == end or (index >= STEPS and over.is_set()):
            return
        time.sleep(PACE_S if index < STEPS else SLOW_PACE_S)
        yield np.full(1, worked.value(index), np.float32)


def _move(former: Stream, target: str, worked: Worked, step: Callable[[Stream, int | None], None]) -> None:
    """To one of several clients that want it at once; all others must learn of it, also those cut off meanwhile."""
    with ExitStack() as stack, ThreadPoolExecutor(RIVALS) as threads:
        clients = [
            stack.enter_context(Client(target, timeout_s=1.0, resume_timeout_s=TIMEOUT_S)) for _ in range(RIVALS)
        ]
        rivals = list(threads.map(lambda client: _taken_over(client, former.resume_point), clients))
        winners = [stream for stream in rivals if stream and _has_it(stream, worked)]
        if len(winners) != 1 or _has_it(former, worked):
            raise AssertionError(f"{len(winners)} clients have the session, or its former one has it again")
        step(winners[0], None)
        winners[0].close()


def _has_it(stream: Stream, worked: Worked) -> bool:
    """Whether it can go on; then what it has missed, and one more answer, are worked."""
    try:
        answer = stream.step(np.full(1, worked.value(stream.next_step), np.float32))
    except SessionMoved:
        return False
    worked.rows += [(row.step, tuple(row.output.tolist())) for row in (*stream.missed, answer)]
    return True


def _taken_over(client: Client, point: ResumePoint) -> Stream | None:
    """Tried for as long as there is hope; None if a later one was faster."""
    until_s = time.monotonic() + TIMEOUT_S
    while True:
        stream = client.stream("accumulator", resume=point)
        try:
            stream.open()
            return stream
        except SessionMoved:
            return None
        except (TryAgain, TimedOut):
            if time.monotonic() > until_s:
                raise
            time.sleep(0.1)


def _longest_gap_s(one: Worked, since_s: float) -> float:
    """From the fault on, between two answers."""
    times_s = [since_s, *(time_s for time_s in one.times_s if time_s > since_s)]
    return max((after - before for before, after in itertools.pairwise(times_s)), default=0.0)


def _problems(one: Worked) -> list[str]:
    if one.error is not None:
        return [f"failed: {''.join(traceback.format_exception(one.error))}"]
    count = max(STEPS, len(one.rows))
    expected = list(enumerate(accumulated([one.value(index) for index in range(count)])))
    wrong = sum(row != right for row, right in itertools.zip_longest(one.rows, expected))
    return [f"{wrong} of {count} answers are wrong, missing or repeated"] if wrong else []


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.fleet", description=__doc__)
    parser.add_argument("--on", choices=("workers", "services"), default="workers")
    parser.add_argument("--plans", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first plan / 100000")
    parser.add_argument(
        "--break", dest="break_name", choices=broken.FLEET_BREAKS, default="", help="break the code first"
    )
    given = parser.parse_args()
    if given.break_name:
        broken.break_processes(given.break_name)
    console = Console(width=None if sys.stdout.isatty() else 120)
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet_of(given.on, Path(folder)) as fleet,
        Progress(console=console) as progress,
    ):
        for number in progress.track(range(given.plans), description="plans"):
            outcome = run_plan(fleet, given.seed * 100_000 + number)
            outcomes.append(outcome)
            for problem in outcome.violations:
                console.print(f"plan {outcome.seed}, {outcome.fault}: {problem}", style="red", highlight=False)
    return _report(outcomes, console)


def _report(outcomes: list[Outcome], console: Console) -> int:
    hits = [outcome for outcome in outcomes if outcome.hit]
    table = Table("fault", "plans", "hit", "longest wait")
    planned, hit = Counter(o.fault for o in outcomes), Counter(o.fault for o in hits)
    for fault in planned:
        longest_s = max((o.recovery_s for o in hits if o.fault == fault), default=0.0)
        table.add_row(fault, str(planned[fault]), str(hit[fault]), f"{longest_s:.2f} s")
    console.print(table)
    failed = [outcome.seed for outcome in outcomes if outcome.violations]
    console.print(f"steps checked: {sum(outcome.steps for outcome in outcomes)}")
    console.print(f"plans with violations: {len(failed)} {failed or ''}", style="red" if failed else "green")
    return 1 if failed or not hits else 0


if __name__ == "__main__":
    sys.exit(main())
