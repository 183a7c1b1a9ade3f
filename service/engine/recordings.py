"""Recordings as their callers have them: few at a time, and nothing of one is sent before the last is stored."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.manifest import ModelKey
from service.engine.lane_refusals import RETRY_AFTER_S, lost
from service.engine.sequence_worker import Abandon, Order
from service.engine.spilled import Ask, Compute, HowFar, Piece, Progress, Read, Record, RecordingOrder, Store, Told
from service.errors import ExecutionFailed, QueueFull

log = logging.getLogger(__name__)


class Recording(Protocol):
    """A sequence that comes in parts. What any of these raises ends it: LaneLost, DiskFull, ExecutionFailed."""

    async def store(self, steps: NDArray[np.generic]) -> None:
        """The next ones: (steps, features) or (steps,). Returns once they are stored."""
        ...

    async def compute(self) -> None:
        """There are no more. Returns once all of it is computed."""
        ...

    async def progress(self) -> Progress:
        """At any time, also beside another call."""
        ...

    async def read(self, max_steps: int, *, last_only: bool) -> Piece:
        """The next piece of the answer, about so many steps at most; with `last_only` only the last row is in one."""
        ...

    def close(self) -> None:
        """Give up all that is kept of it, computed or not. To be called in any case."""
        ...


class RecordingMetrics(Protocol):
    """Where they are counted."""

    def sequence(self, model: ModelKey) -> None:
        """One was computed."""
        ...

    def recordings(self, count: int) -> None:
        """So many are under way now."""
        ...


class Recordings:
    """Those of one lane."""

    def __init__(
        self, send: Callable[[Order], None], numbers: Iterator[int], max_recordings: int, metrics: RecordingMetrics
    ) -> None:
        """`send` gives an order to the worker, `numbers` are those of its sequences."""
        self.generation = 0  # of the worker
        self._send = send
        self._numbers = numbers
        self._max_recordings = max_recordings
        self._places = asyncio.Semaphore(max_recordings)
        self._under_way = 0
        self._metrics = metrics
        self._calls = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}

    async def begin(self, bundle: Bundle, *, wait: bool) -> Recording:
        """Where there are as many as may be, waits or raises QueueFull. Also raises what a Recording does."""
        if self._places.locked() and not wait:
            limit = self._max_recordings
            message = f"{limit} sequences in parts are under way, as many as may be"
            raise QueueFull(message, retry_after_s=RETRY_AFTER_S, limit=limit)
        await self._places.acquire()
        self._count(1)
        recording = _InWorker(self, next(self._numbers), bundle.manifest.key)
        try:
            await recording.ask(Record(recording.number, bundle.folder))
        except BaseException:
            recording.close()
            raise
        return recording

    async def ask(self, order: RecordingOrder) -> Any:
        """What the worker tells about it."""
        call, told = next(self._calls), asyncio.get_running_loop().create_future()
        self._asked[call] = told
        self._send(Ask(call, order))
        try:
            return await told
        finally:
            del self._asked[call]

    def hear(self, told: Told) -> None:
        """What the worker tells."""
        asked = self._asked.get(told.call)
        if asked is None or asked.done():
            return
        if told.error is None:
            asked.set_result(told.answer)
        elif isinstance(told.error, str):
            log.error("a sequence in parts failed: %s", told.error)
            asked.set_exception(ExecutionFailed("the network could not compute this sequence"))
        else:
            asked.set_exception(told.error)

    def worker_died(self) -> None:
        """What it had of them is gone."""
        self.generation += 1
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(lost())

    def computed(self, model: ModelKey) -> None:
        """One was."""
        self._metrics.sequence(model)

    def give_up(self, recording: _InWorker) -> None:
        """Its files, and its place."""
        if recording.generation == self.generation:
            self._send(Abandon(recording.number))
        self._places.release()
        self._count(-1)

    def _count(self, change: int) -> None:
        self._under_way += change
        self._metrics.recordings(self._under_way)


class _InWorker:
    """A Recording."""

    def __init__(self, recordings: Recordings, number: int, model: ModelKey) -> None:
        self.number = number
        self.generation = recordings.generation
        self._recordings = recordings
        self._model = model
        self._closed = False

    async def ask(self, order: RecordingOrder) -> Any:
        if self.generation != self._recordings.generation:
            raise lost()
        return await self._recordings.ask(order)

    async def store(self, steps: NDArray[np.generic]) -> None:
        await self.ask(Store(self.number, steps))

    async def compute(self) -> None:
        await self.ask(Compute(self.number))
        self._recordings.computed(self._model)

    async def progress(self) -> Progress:
        progress: Progress = await self.ask(HowFar(self.number))
        return progress

    async def read(self, max_steps: int, *, last_only: bool) -> Piece:
        piece: Piece = await self.ask(Read(self.number, max_steps, last_only))
        return piece

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._recordings.give_up(self)
