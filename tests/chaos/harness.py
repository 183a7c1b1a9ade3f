"""Runs plans: one fault each, in the midst of a stream, and then the proof that every step counted exactly once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty

from rnnserve import Client, ResumePoint, RnnserveError, SessionExists, SessionNotFound
from tests.chaos.client import Row
from tests.chaos.plans import OF_PROCESSES, STEPS, Clients, Plan, Script, make_plan
from tests.chaos.proxy import BOTH, Direction, Proxy
from tests.chaos.server import ChaosServer
from tests.chaos.server_with_points import Action, Armed
from tests.chaos.subjects import MESSAGE_TIMEOUT_S, ProcessSubject, Subject, ThreadSubject

STOPPED_S = 1.0
BLACK_HOLE_S = 1.6  # longer than the client waits for an answer
FULL_DISK_S = 0.4
LOCKED_S = 1.5  # longer than the store waits for a lock
DELAY_S = 0.15
QUIET_TIMEOUT_S = 3.0
PLAN_TIMEOUT_S = 30.0
POLL_S = 0.002
ATTEMPTS = 6
CLIENT_POINTS = ("before_send", "after_send")


@dataclass
class Outcome:
    """What came of a plan."""

    plan: Plan
    hit: bool = False
    """Whether the fault came while the step was in flight and, where it is one of the store, a write failed."""
    attempts: int = 1
    steps: int = 0
    recovery_s: float = 0.0
    """From the fault to the next answer."""
    proved_erased: bool = False
    """Whether a crash after the end was to show that nothing is left."""
    violations: list[str] = field(default_factory=list)


class Harness:
    """A server, the proxy in front of it, and the plans that run through them."""

    def __init__(self, repository: Path, folder: Path, break_name: str = "") -> None:
        self._folder = folder
        self._break_name = break_name
        self._server = ChaosServer(repository, folder, break_name)

    def close(self) -> None:
        self._server.close()

    def run(self, seed: int, clients: Clients = "both") -> Outcome:
        """The plan of the seed; with other steps until its fault hits."""
        for attempt in range(ATTEMPTS):
            outcome = self._run(make_plan(seed, attempt, clients))
            outcome.attempts = attempt + 1
            if outcome.hit or outcome.violations:
                break
        return outcome

    def _run(self, plan: Plan) -> Outcome:
        outcome = Outcome(plan)
        self._server.wait_for_store()
        self._proxy = Proxy(self._server.port)  # a port of its own, for gRPC shares connections between channels
        at_client = plan.point in CLIENT_POINTS
        target = f"127.0.0.1:{self._proxy.port}"
        subject: Subject
        if plan.fault in OF_PROCESSES:
            subject = ProcessSubject(plan, target, self._folder, self._break_name, watches=at_client)
        else:
            subject = ThreadSubject(plan, target, watches=at_client)
        subject.before_last = lambda: self._before_last(plan, subject, outcome)
        failures = self._server.store_failures
        began_s = time.monotonic()
        try:
            if at_client:
                self._run_with_client_point(plan, subject, outcome)
            else:
                self._run_with_server_point(plan, subject, outcome)
            if not subject.over.wait(max(1.0, began_s + PLAN_TIMEOUT_S - time.monotonic())):
                outcome.violations.append(f"the client did not finish within {PLAN_TIMEOUT_S:g} s")
        finally:
            self._proxy.close()
            subject.close()
        if subject.error is not None:
            outcome.violations.append(f"the client failed: {subject.error!r}")
        if plan.fault in ("full_disk", "locked_database"):
            outcome.hit &= self._server.store_failures > failures
        for session, script in plan.scripts.items():
            rows = subject.rows(session)
            outcome.steps += len(rows)
            outcome.violations += [f"{session}: {problem}" for problem in violations(rows, script)]
        if subject.erased and (plan.target == "close" or plan.choice * 10 % 1 < 0.3):
            self._prove_erased(subject.erased, outcome)
        return outcome

    def _run_with_server_point(self, plan: Plan, subject: Subject, outcome: Outcome) -> None:
        actions: dict[str, Action] = {"kill": "kill", "both_die": "kill", "stop": "stop"}
        while not self._server.reached.empty():
            self._server.reached.get()
        self._server.arm(Armed(plan.session, plan.point, plan.target, plan.step, actions.get(plan.fault, "wait")))
        subject.start()
        report = self._report(subject)
        if report is None:
            subject.fault_over.set()
            self._server.arm(None)
            return
        outcome.hit = subject.waits
        with self._recovery(subject, outcome):
            self._inject(plan, subject, outcome, self._server.go, itself=plan.fault in actions)

    def _report(self, subject: Subject) -> dict[str, int] | None:
        until_s = time.monotonic() + PLAN_TIMEOUT_S
        while time.monotonic() < until_s:
            with contextlib.suppress(Empty):
                return self._server.reached.get(timeout=0.05)
            if not subject.waits and self._server.reached.empty():
                return None
        return None

    def _run_with_client_point(self, plan: Plan, subject: Subject, outcome: Outcome) -> None:
        """The fault comes when the message is made and no byte of it was sent, or none of it has passed the proxy."""
        made, go = threading.Event(), threading.Event()
        forwarded_bytes: list[int] = []

        def hold() -> None:
            until_s = time.monotonic() + QUIET_TIMEOUT_S
            while subject.answered < plan.first_of_message and time.monotonic() < until_s:
                time.sleep(POLL_S)
            if plan.point == "after_send":
                self._proxy.hold(["up"])
            forwarded_bytes.append(self._proxy.forwarded_bytes["up"])

        def wait_if_unsent() -> None:
            made.set()
            if plan.point == "before_send":
                go.wait(PLAN_TIMEOUT_S)

        subject.giving, subject.made = hold, wait_if_unsent
        subject.start()
        until_s = time.monotonic() + PLAN_TIMEOUT_S
        while not made.is_set() and not subject.over.is_set() and time.monotonic() < until_s:
            time.sleep(POLL_S)
        outcome.hit = made.is_set() and subject.waits and subject.answered == plan.first_of_message
        if plan.point == "after_send":
            outcome.hit &= self._proxy.wait_for_message(MESSAGE_TIMEOUT_S)
            outcome.hit &= forwarded_bytes == [self._proxy.forwarded_bytes["up"]]
        with self._recovery(subject, outcome):
            self._inject(plan, subject, outcome, self._proxy.release if plan.point == "after_send" else go.set)

    @contextmanager
    def _recovery(self, subject: Subject, outcome: Outcome) -> Iterator[None]:
        """From the fault to the next answer, however long the fault lasts."""
        began_s, before = time.monotonic(), (subject.answered, subject.resets)

        def watch() -> None:
            while (subject.answered, subject.resets) <= before and not subject.over.is_set():
                if time.monotonic() - began_s > PLAN_TIMEOUT_S:
                    return
                time.sleep(POLL_S)
            outcome.recovery_s = max(outcome.recovery_s, time.monotonic() - began_s)

        watcher = threading.Thread(target=watch, name="recovery", daemon=True)
        watcher.start()
        yield
        watcher.join(PLAN_TIMEOUT_S)

    def _inject(
        self, plan: Plan, subject: Subject, outcome: Outcome, go: Callable[[], None], *, itself: bool = False
    ) -> None:
        """The fault, at once; `go` ends the wait at the point, where it waits."""
        match plan.fault:
            case "kill":
                self._crash(itself)
                go()
            case "stop":
                if not itself:
                    self._server.stop()
                go()
                time.sleep(STOPPED_S)
                self._server.resume()
            case "cut":
                if plan.choice < 0.5:
                    self._proxy.cut()
                    go()
                else:  # the step arrives, its answer does not, and the next connection is slow
                    self._proxy.hold(["down"])
                    if plan.point != "after_send":
                        go()
                    time.sleep(DELAY_S)
                    self._proxy.cut()
                    self._proxy.delay(DELAY_S)
            case "half_close":
                directions: tuple[Direction, Direction] = BOTH
                self._proxy.half_close(directions[plan.choice < 0.5])
                go()
            case "black_hole":
                self._black_hole(plan, go)
            case "full_disk":
                with self._server.full_disk():
                    self._suffer(plan, go, FULL_DISK_S)
            case "locked_database":
                with self._server.locked_database():
                    self._suffer(plan, go, LOCKED_S)
            case "client_dies" | "both_die":
                assert isinstance(subject, ProcessSubject)
                subject.die()
                if plan.fault == "both_die":
                    self._crash(itself)
                go()
                subject.be_reborn()
            case "taken_over":
                assert isinstance(subject, ProcessSubject)
                self._take_over(plan, subject, outcome, go)
        if self._is_crash_to_follow(plan):
            with self._recovery(subject, outcome):
                self._server.start()
                subject.fault_over.set()
        subject.fault_over.set()

    def _take_over(self, plan: Plan, subject: ProcessSubject, outcome: Outcome, go: Callable[[], None]) -> None:
        """While the client pauses; where the server crashes then, the client must not get its session back."""
        subject.pause()
        go()
        subject.be_succeeded()
        if plan.choice < 0.5:
            self._crash(itself=False)
        last_words = subject.wake_former()
        if last_words != "moved" and plan.target != "close":  # a close is over in any case
            outcome.violations.append(f"the client that was taken over did not hear so; its last words: {last_words}")

    def _prove_erased(self, sessions: Sequence[str], outcome: Outcome) -> None:
        """A crash must not bring back what its client was told is erased."""
        self._crash(itself=False)
        outcome.proved_erased = True
        client = Client(f"127.0.0.1:{self._server.port}", timeout_s=QUIET_TIMEOUT_S)
        with client:
            for session in sessions:
                with contextlib.suppress(SessionNotFound):
                    client.session(session)
                    outcome.violations.append(f"{session} was said to be erased, but a crash brought it back")

    def _crash(self, itself: bool) -> None:
        if itself:
            self._server.wait_for_end()
        else:
            self._server.kill()
        self._server.start()

    def _black_hole(self, plan: Plan, go: Callable[[], None]) -> None:
        """One direction or both; in the end all arrives late, or the connection is cut."""
        kinds: tuple[tuple[Direction, ...], ...] = (("up",), ("down",), BOTH)
        self._proxy.hold(kinds[int(plan.choice * 3)])
        if plan.point != "after_send":
            go()
        time.sleep(BLACK_HOLE_S)
        if plan.choice * 6 % 1 < 0.5:
            self._proxy.cut()
        self._proxy.release()

    def _suffer(self, plan: Plan, go: Callable[[], None], duration_s: float) -> None:
        """A fault of the store; where a crash is to follow, it comes before the store is well again."""
        go()
        time.sleep(duration_s)
        if self._is_crash_to_follow(plan):
            self._server.kill()

    @staticmethod
    def _is_crash_to_follow(plan: Plan) -> bool:
        return plan.fault in ("full_disk", "locked_database") and plan.choice < 0.5

    def _before_last(self, plan: Plan, subject: Subject, outcome: Outcome) -> None:
        """The last step proves the state as it is after the fault."""
        if plan.target != "close":
            subject.fault_over.wait(PLAN_TIMEOUT_S)
        self._intrude(plan, outcome)

    def _intrude(self, plan: Plan, outcome: Outcome) -> None:
        """Somebody else knows the id of the session but not its token, and must not get in."""
        if plan.choice > 0.3:
            return
        point = ResumePoint(plan.session, "00" * 16, STEPS)
        with Client(f"127.0.0.1:{self._server.port}", timeout_s=5.0) as client:
            intruder = client.stream("accumulator", resume=point)
            try:
                intruder.open()
            except (SessionExists, SessionNotFound):  # the latter after a crash, until its owner comes back
                return
            except RnnserveError as error:
                outcome.violations.append(f"an intruder was refused, but by {error!r}")
                return
            outcome.violations.append("an intruder got the session with another token")
            intruder.abort()


def violations(rows: Sequence[Row], script: Script) -> list[str]:
    """What is wrong with the answers that the client got about one session."""
    found = []
    steps = [step for step, _ in rows]
    if steps != list(range(STEPS + 1)):
        missing = sorted(set(range(STEPS + 1)) - set(steps))
        repeated = sorted({step for step in steps if steps.count(step) > 1})
        found.append(f"{len(steps)} answers: missing {missing}, repeated {repeated}, in order {steps == sorted(steps)}")
    expected = script.expected()
    wrong = [(step, output) for step, output in rows if step > STEPS or output != expected[step]]
    if wrong:
        step, output = wrong[0]
        right = expected[step] if step <= STEPS else "none"
        found.append(f"{len(wrong)} wrong answers, the first to step {step}: {output} instead of {right}")
    return found
