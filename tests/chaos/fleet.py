"""`python -m tests.chaos.fleet --plans 200 --on workers`: faults of whole processes, while several streams are at work.

On workers: three under a supervisor, over one SQLite file. On services: two over one Redis, behind a real Envoy. Each
plan is one fault in the midst of several clients, which have a stream or several sessions on a multiplexed call, of
whole numbers, which the server sums exactly; it counts if it broke off a call that waited for an answer, or, where the
fault is none of the calls', if they went on while it lasted. In every third plan several clients want one of the
sessions at once, and one must have it.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rnnserve import Client, Notice, ResumePointLost, SessionMoved, TimedOut, TryAgain
from tests.chaos import broken
from tests.chaos.calls import STEPS, Call, MultiplexedCall, StreamCall, Worked
from tests.chaos.fleets import Fleet, fleet_of
from tests.chaos.plans import Clients, is_one_multiplexed
from tests.support.bundles import accumulated

CLIENTS = 4
SESSIONS = {StreamCall: 1, MultiplexedCall: 3}
TIMEOUT_S = 40.0
RIVALS = 3
CONNECTIONS = 4  # of a client, so that its streams find another process while theirs is paused


@dataclass
class Outcome:
    """What came of a plan."""

    seed: int
    fault: str
    hit: bool = False
    steps: int = 0
    recovery_s: float = 0.0
    violations: list[str] = field(default_factory=list)


def run_plan(fleet: Fleet, seed: int, clients: Clients = "both") -> Outcome:
    """One fault in the midst of several clients; every third time a session changes hands meanwhile, in a race."""
    drawn, kind_drawn = random.Random(seed), random.Random(f"{seed}/clients")
    names = list(fleet.faults)
    outcome = Outcome(seed, names[seed % len(names)])
    fleet.recover()
    kinds = [MultiplexedCall if is_one_multiplexed(clients, kind_drawn) else StreamCall for _ in range(CLIENTS)]
    numbers = itertools.count()
    sessions = [[Worked(seed, next(numbers)) for _ in range(SESSIONS[kind])] for kind in kinds]
    worked = list(itertools.chain(*sessions))
    strike_at, over = drawn.randrange(STEPS // 4, STEPS // 2), threading.Event()
    with ThreadPoolExecutor(CLIENTS) as threads:
        done = [
            threads.submit(_work, fleet.target, kind, own, over, moves=seed % 3 == 0 and own is sessions[0])
            for kind, own in zip(kinds, sessions, strict=True)
        ]
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
        outcome.violations += [f"{one.session}: {problem}" for problem in _problems(one)]
    return outcome


def _work(
    target: str, call_type: type[Call], sessions: Sequence[Worked], over: threading.Event, *, moves: bool
) -> None:
    """Steps until the fault is over, and at least so many. If one moves, another client takes it over half-way."""

    def told(notice: Notice) -> None:
        for one in sessions:
            about = notice.session in (None, one.session)
            one.interrupted |= about and notice.reason in ("interrupted", "draining")

    try:
        with _client(target) as client:
            call = call_type(client, told)
            call.begin(sessions)
            if moves:
                call.work(over, STEPS // 2)
                _move(call, target, sessions, over)
            else:
                call.work(over)
                call.close()
    except BaseException as error:
        for one in sessions:
            one.error = error


def _client(target: str) -> Client:
    return Client(target, timeout_s=1.0, resume_timeout_s=TIMEOUT_S, connections=CONNECTIONS)


def _move(former: Call, target: str, sessions: Sequence[Worked], over: threading.Event) -> None:
    """One to one of several clients that want it at once; all others must learn of it, also those cut off meanwhile.

    What is left to the former one goes on.
    """
    one, *others = sessions
    with ExitStack() as stack, ThreadPoolExecutor(RIVALS) as threads:
        clients = [stack.enter_context(_client(target)) for _ in range(RIVALS)]
        rivals = list(threads.map(lambda client: _taken_over(client, former, one), clients))
        winners = [call for call in rivals if call and _has_it(call, one)]
        if len(winners) != 1 or _has_it(former, one):
            raise AssertionError(f"{len(winners)} clients have the session, or its former one has it again")
        (winner,) = winners
        won = threads.submit(winner.work, over)
        if others:
            former.work(over)
            former.close()
        won.result()
        winner.close()


def _has_it(call: Call, one: Worked) -> bool:
    """Whether it can go on; then what it has missed, and one more answer, are worked."""
    try:
        call.step(one)
    except SessionMoved:
        return False
    return True


def _taken_over(client: Client, former: Call, one: Worked) -> Call | None:
    """Tried for as long as there is hope; None if a later one was faster."""
    point, until_s = former.resume_point(one), time.monotonic() + TIMEOUT_S
    while True:
        call = type(former)(client)
        try:
            call.take_over(one, point)
            return call
        except SessionMoved:
            return None
        except ResumePointLost as lost:  # what was answered and not durable is to be sent again, by whoever can
            point = point._replace(answered_step=int(lost.metadata["expected_step"]))
            if point.answered_step < former.durable_step(one):
                raise
            del one.rows[point.answered_step :]
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
    parser.add_argument("--clients", choices=get_args(Clients), default="both", help="what the plans may have")
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
            outcome = run_plan(fleet, given.seed * 100_000 + number, given.clients)
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
