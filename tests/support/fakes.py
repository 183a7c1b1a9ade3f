"""Stand-ins for the parts next to the one under test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.executor import Floats
from service.errors import ServingError
from service.sessions.record import SessionKey, SessionRecord, SessionSummary, summary_of
from service.sessions.stores.store import CLOSE_TIMEOUT_S, RecordUnreadable, StoreError

RAISES = 666.0
TURNS_NAN = 13.0


class FakeExecutor:
    """Adds each step (1,) to the row (1,) and answers with the sum. Hears `RAISES` and `TURNS_NAN`.

    `ticks` has the inputs of every forward. While `gate` is clear a forward waits; `entered` says that one began.
    """

    row_size = 1

    def __init__(self) -> None:
        self.ticks: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.before_return: Callable[[], object] = lambda: None

    def step(self, inputs: NDArray[np.generic], rows: Floats) -> tuple[Floats, Floats]:
        values = inputs.astype(np.float32)
        self.ticks.append(values[:, 0].tolist())
        self.entered.set()
        if not self.gate.wait(30):
            raise TimeoutError("the test left the gate shut")
        if (values == RAISES).any():
            raise RuntimeError("secret of the executor")
        sums = rows + np.where(values == TURNS_NAN, np.nan, values).astype(np.float32)
        self.before_return()
        return sums, sums


class FakeStream:
    """An owner of a session that remembers what it was told."""

    def __init__(self) -> None:
        self.lost: ServingError | None = None
        self.is_lost = asyncio.Event()
        self.times_durable = 0

    def lose(self, error: ServingError) -> None:
        self.lost = error
        self.is_lost.set()

    def became_durable(self) -> None:
        self.times_durable += 1


class CountingMetrics:
    """Keeps what it was told, as (name, values…)."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def tick(self, model: ModelKey, sessions: int, duration_s: float) -> None:
        self.events.append(("tick", model, sessions))

    def steps(self, model: ModelKey, applied: int) -> None:
        self.events.append(("steps", model, applied))

    def session_opened(self, model: ModelKey) -> None:
        self.events.append(("opened", model))

    def session_resumed(self, model: ModelKey) -> None:
        self.events.append(("resumed", model))

    def recordings(self, count: int) -> None:
        self.events.append(("recordings", count))

    def live_sessions(self, model: ModelKey, sessions: int) -> None:
        self.events.append(("live", model, sessions))

    def parked(self, sessions: Mapping[ModelKey, int], size_bytes: int) -> None:
        self.events.append(("parked", sum(sessions.values())))

    def evicted(self, limit: str) -> None:
        self.events.append(("evicted", limit))

    def checkpoint(self, sessions: int, duration_s: float) -> None:
        self.events.append(("checkpoint", sessions))

    def store_available(self, available: bool) -> None:
        self.events.append(("store available", available))

    def queued(self, sequences: int) -> None:
        self.events.append(("queued", sequences))

    def waited(self, model: ModelKey, duration_s: float) -> None:
        pass

    def sequence_begun(self, model: ModelKey, queued_s: float) -> None:
        pass

    def lane_died(self) -> None:
        self.events.append(("lane died",))

    def sequence_abandoned(self, model: ModelKey) -> None:
        self.events.append(("abandoned", model))

    def store_asked(self, operation: str, duration_s: float) -> None:
        pass

    def store_failed(self, operation: str) -> None:
        self.events.append(("store failed", operation))

    def batch(self, model: ModelKey, sequences: int, duration_s: float, steps: int, padding: int) -> None:
        self.events.append(("batch", model, sequences))

    def sequence(self, model: ModelKey) -> None:
        self.events.append(("sequence", model))


def column(*values: float) -> Floats:
    """Steps of one feature: (len(values), 1)."""
    return np.array(values, np.float32).reshape(-1, 1)


class FakeStore:
    """A durable store in memory. While `down` it refuses everything, while `full` all but reads; `gate` holds all up.

    The records of `damaged` keys cannot be read. `scrubs` has what was erased together, each time. Every operation sets
    `asked`.
    """

    durable = True

    def __init__(self) -> None:
        self.records: dict[SessionKey, SessionRecord] = {}
        self.scrubs: list[list[SessionKey]] = []
        self.scrubs_ended = False
        self.down = False
        self.full = False
        self.damaged: set[SessionKey] = set()
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self) -> list[SessionSummary]:
        await self._answer()
        return sorted(map(summary_of, self.records.values()), key=lambda summary: summary.used_s)

    async def write(self, records: Sequence[SessionRecord]) -> None:
        await self._take()
        self.records |= {record.key: record for record in records}

    async def read(self, key: SessionKey) -> SessionRecord | None:
        await self._answer()
        if key in self.damaged:
            raise RecordUnreadable("a stored session is damaged")
        return self.records.get(key)

    async def erase(self, keys: Iterable[SessionKey], *, scrub: bool = False) -> None:
        await self._take()
        for key in keys:
            self.records.pop(key, None)
        if scrub:
            self.scrubs.append(list(keys))

    async def probe(self) -> None:
        await self._take()

    def end_scrubs(self) -> None:
        self.scrubs_ended = True

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None: ...

    async def _answer(self) -> None:
        self.asked.set()
        await self.gate.wait()
        if self.down:
            raise StoreError("the store is down")

    async def _take(self) -> None:
        await self._answer()
        if self.full:
            raise StoreError("the store is full")
