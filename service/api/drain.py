"""Shutting down without cutting anybody off: who is being served, who is told, and when waiting ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import cast

from service.errors import Draining

RETRY_ALONE_S = 2.0  # until another process is here
RETRY_AMONG_OTHERS_S = 0.1  # another one serves already


class Drain:
    """Tracks the calls that do work. Once begun, it lets them finish until the deadline, then ends them."""

    def __init__(self, retry_after_s: float = RETRY_ALONE_S) -> None:
        """`retry_after_s` is what clients are told."""
        self._retry_after_s = retry_after_s
        self._calls: set[asyncio.Task[object]] = set()
        self._deadline_s: float | None = None
        self.ended = False

    @contextmanager
    def track(self) -> Iterator[None]:
        """Count the current task as a call. Raises Draining once the drain has begun."""
        if self._deadline_s is not None:
            raise self.refusal()
        task = cast("asyncio.Task[object]", asyncio.current_task())  # gRPC runs every call in a task
        self._calls.add(task)
        try:
            yield
        finally:
            self._calls.discard(task)

    async def run(self, timeout_s: float, notify: Callable[[float], Awaitable[None]], *, last_words_s: float) -> None:
        """Refuse new calls, tell the live ones by `notify(time_left_s)`, wait, then cancel those that are left.

        A cancelled call sees `ended` and tells its client why, for which there is a time, too.
        """
        self._deadline_s = time.monotonic() + timeout_s
        notices = asyncio.ensure_future(notify(timeout_s))
        await self._wait(timeout_s)
        self.ended = True
        notices.cancel()
        for call in self._calls:
            call.cancel()
        await self._wait(last_words_s)

    async def _wait(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self._calls and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.wait(self._calls, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)

    def refusal(self) -> Draining:
        """What clients are told."""
        return Draining("the server is shutting down; another one may serve you", retry_after_s=self._retry_after_s)
