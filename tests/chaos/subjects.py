"""The client under test at work on the script of a plan, in a thread or in a process of its own."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rnnserve import ResumePoint
from tests.chaos.client import Event, Row, Watched, run_script
from tests.chaos.client_process import first_line
from tests.chaos.multiplexed_client import run_scripts
from tests.chaos.plans import Plan
from tests.chaos.record import read_record
from tests.support.server import ROOT

MESSAGE_TIMEOUT_S = 3.0
SUCCESSION_TIMEOUT_S = 10.0


class Subject(ABC):
    """A client that works on the script of a plan, in a thread or in a process, and what it has recorded."""

    def __init__(self, plan: Plan, target: str, *, watches: bool) -> None:
        self.plan = plan
        self.target = target
        self.watches = watches
        self.giving: Callable[[], None] = lambda: None
        self.made: Callable[[], None] = lambda: None
        self.before_last: Callable[[], None] = lambda: None
        self.error: BaseException | None = None
        self.over = threading.Event()
        self.fault_over = threading.Event()

    @abstractmethod
    def start(self) -> None:
        """Begin the script."""

    @abstractmethod
    def rows(self, session: str) -> list[Row]:
        """The answers so far."""

    @abstractmethod
    def close(self) -> None:
        """End whatever is left of it."""

    @property
    @abstractmethod
    def erased(self) -> list[str]:
        """The sessions of which it was told that nothing is left."""

    @property
    @abstractmethod
    def resets(self) -> int:
        """How many were answered, of the session at which the plan strikes."""

    @property
    def answered(self) -> int:
        """How many steps of it were."""
        return len(self.rows(self.plan.session))

    @property
    def waits(self) -> bool:
        """Whether the message at which the plan strikes has no answer yet."""
        match self.plan.target:
            case "steps":
                return self.answered <= self.plan.step
            case "reset":
                return self.resets <= self.plan.script.resets.index(self.plan.step)
            case "close":
                return not self.over.is_set()


class ThreadSubject(Subject):
    """In a thread of the harness."""

    def start(self) -> None:
        self._events: dict[str, list[Event]] = {session: [] for session in self.plan.scripts}
        threading.Thread(target=self._run, name="subject", daemon=True).start()

    def rows(self, session: str) -> list[Row]:
        return [event for event in self._events[session] if isinstance(event, tuple)]

    @property
    def resets(self) -> int:
        return sum(isinstance(event, int) for event in self._events[self.plan.session])

    @property
    def erased(self) -> list[str]:
        return [session for session, events in self._events.items() if "erased" in events]

    def close(self) -> None:
        """The thread ends with its script."""

    def _record(self, session: str, event: Event, _point: ResumePoint) -> None:
        self._events[session].append(event)

    def _run(self) -> None:
        try:
            plan, watched = self.plan, None
            if self.watches:
                watched = Watched(plan.target, plan.step, lambda: self.giving(), lambda: self.made())
            if plan.is_multiplexed:
                run = partial(run_scripts, self.target, plan.scripts)
            else:
                run = partial(run_script, self.target, plan.session, plan.script)
            run(self._record, watched=watched, before_last=lambda: self.before_last())
        except BaseException as error:
            self.error = error
        self.over.set()


class ProcessSubject(Subject):
    """In a process of its own, which can be killed."""

    def __init__(self, plan: Plan, target: str, folder: Path, break_name: str, *, watches: bool) -> None:
        super().__init__(plan, target, watches=watches)
        self._file = folder / f"{plan.session}.record"
        self._file.unlink(missing_ok=True)
        self._break_name = break_name
        self._resumed = threading.Event()
        self._last_words: dict[int, str] = {}  # by process id

    def start(self) -> None:
        self._begin(watches=self.watches)
        self._former, self._former_listener = self._process, self._listener

    def rows(self, session: str) -> list[Row]:
        return read_record(self._file, session).rows

    @property
    def resets(self) -> int:
        return len(read_record(self._file, self.plan.session).resets)

    @property
    def erased(self) -> list[str]:
        return [session for session in self.plan.scripts if read_record(self._file, session).erased]

    def die(self) -> None:
        self._process.kill()
        self._process.wait()

    def be_reborn(self) -> None:
        self._listener.join(MESSAGE_TIMEOUT_S)
        self._begin(watches=False)

    def pause(self) -> None:
        """No instruction more of this process."""
        self._process.send_signal(signal.SIGSTOP)

    def be_succeeded(self) -> None:
        """Another process takes the session over, and this one no longer counts. Return once it has the session."""
        self._former, self._former_listener = self._process, self._listener
        file = self._file.with_suffix(".succeeded")
        shutil.copy(self._file, file)
        self._file = file
        self._begin(watches=False)
        self._resumed.wait(SUCCESSION_TIMEOUT_S)

    def wake_former(self) -> str:
        """The last that the former process says."""
        self._former.send_signal(signal.SIGCONT)
        self._former_listener.join(SUCCESSION_TIMEOUT_S)
        return self._last_words.get(self._former.pid, "nothing")

    def close(self) -> None:
        for process in (self._process, self._former):
            process.kill()
            process.wait()

    def _begin(self, *, watches: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.client_process", self.target, str(self._file)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(first_line(self.plan, self._break_name, watches=watches))
        self._process.stdin.flush()
        self._listener = threading.Thread(target=self._listen, args=(self._process,), name="subject", daemon=True)
        self._listener.start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError), process.stdin, process.stdout:  # it may die at any time
            for line in process.stdout:
                words = line.strip()
                self._last_words[process.pid] = words
                match words:
                    case "giving":
                        self.giving()
                    case "made":
                        self.made()
                    case "resumed":
                        self._resumed.set()
                    case "before_last" if process is self._process:
                        self.before_last()
                    case "done" if process is self._process:
                        self.over.set()
                with contextlib.suppress(OSError):
                    process.stdin.write("go\n")
                    process.stdin.flush()
        if process.wait() > 0 and process is self._process:
            self.error = RuntimeError(f"the client process ended with exit code {process.returncode}")
            self.over.set()
