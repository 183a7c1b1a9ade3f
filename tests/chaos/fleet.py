"""`python -m tests.chaos.fleet --plans 200 --on workers`: faults of whole processes, while several streams are at work.

On workers: three under a supervisor, over one SQLite file. On services: two over one Redis, behind a real Envoy. Each
plan is one fault in the midst of several streams of whole numbers, which the server sums exactly; it counts if it broke
off a stream that waited for an answer, or, where the fault is none of the streams', if they went on while it lasted. In
every third plan several clients want one of the sessions at once, and one must have it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rnnserve import Client, Notice, ResumePointLost, SessionMoved, Stream, TimedOut, TryAgain
from tests.chaos import broken
from tests.chaos.fleets import Fleet, fleet_of
from tests.support.bundles import accumulated

STREAMS = 4
STEPS = 60
PACE_S = 0.01
SLOW_PACE_S = 0.05  # of a stream that only waits for the end of a fault: its sums stay exact however long that is
TIMEOUT_S = 40.0
RIVALS = 3
CONNECTIONS = 4  # of a client, so that its streams find another process while theirs is paused


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
        with _client(target) as client:
            stream = client.stream("accumulator", session=f"fleet-{worked.seed}-{worked.number}", on_notice=told)
            stream.open()
            step(stream, STEPS // 2 if moves else None)
            if moves:
                _move(stream, target, worked, step)
            else:
                stream.close()
    except BaseException as error:
        worked.error = error


def _client(target: str) -> Client:
    return Client(target, timeout_s=1.0, resume_timeout_s=TIMEOUT_S, connections=CONNECTIONS)


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
        clients = [stack.enter_context(_client(target)) for _ in range(RIVALS)]
        rivals = list(threads.map(lambda client: _taken_over(client, former, worked), clients))
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


def _taken_over(client: Client, former: Stream, worked: Worked) -> Stream | None:
    """Tried for as long as there is hope; None if a later one was faster."""
    point, until_s = former.resume_point, time.monotonic() + TIMEOUT_S
    while True:
        stream = client.stream("accumulator", resume=point)
        try:
            stream.open()
            return stream
        except SessionMoved:
            return None
        except ResumePointLost as lost:  # what was answered and not durable is to be sent again, by whoever can
            point = point._replace(answered_step=int(lost.metadata["expected_step"]))
            if point.answered_step < former.durable_step:
                raise
            del worked.rows[point.answered_step :]
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
