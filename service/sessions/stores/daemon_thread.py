"""A thread for blocking work that does not hold up the end of the process, as those of an executor would."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


class DaemonThread:
    """Does one thing after the other, in the order in which it is asked."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: Thread | None = None

    async def do(self, operation: Callable[[], Result]) -> Result:
        """What the operation returns or raises; if the caller is cancelled, one that has begun goes on."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        outcome: Future[Result] = Future()
        self._calls.put(lambda: _settle(outcome, operation))
        return await asyncio.wrap_future(outcome)

    def end(self) -> None:
        """End after what was asked so far."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _settle(outcome: Future[Result], operation: Callable[[], Result]) -> None:
    if outcome.set_running_or_notify_cancel():
        try:
            outcome.set_result(operation())
        except BaseException as error:
            outcome.set_exception(error)
