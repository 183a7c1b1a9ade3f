"""Which steps share the next tick. Knows jobs, their order and fairness; no torch, no gRPC, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Model = TypeVar("Model")
Job = TypeVar("Job", bound="StepJob")


@dataclass(eq=False, slots=True)
class StepJob:
    """Steps that wait for ticks: inputs (steps, features) or (steps,).

    Those of one session go in turn, each to a tick of its own. Those of as many sessions may share one. A job that goes
    alone shares none, so that what else there is changes nothing of its results, not even in the last bit.
    """

    inputs: NDArray[np.generic]
    in_turn: bool
    tenant: str = ""
    taken: int = 0  # steps that ticks have had
    abandoned: bool = False
    alone: bool = False

    @property
    def left(self) -> int:
        """How many steps still wait."""
        return 0 if self.abandoned else len(self.inputs) - self.taken

    @property
    def ready(self) -> int:
        """How many of them one tick may take."""
        return min(self.left, 1) if self.in_turn else self.left


class Batcher(Generic[Model, Job]):
    """First come, first served among the sessions of a tenant; tenants share a tick equally.

    A tick goes to the tenants that want least of it first, and what they leave to the others (max-min fairness:
    Bertsekas, Gallager, "Data Networks", 1992, 6.5.2). A job that has more steps than a tick takes goes to the end of
    its queue, so a long job, or one of many sessions, delays a short one by at most one tick. Models take turns, and
    within a model those that go alone, together, with all others: so these get every other tick at least.
    """

    def __init__(self, max_tick_sessions: int) -> None:
        self._max_tick_sessions = max_tick_sessions
        # Only models and tenants with jobs, those whose turn it is first.
        self._queues: dict[tuple[Model, bool], dict[str, deque[Job]]] = {}  # bool: whether they go alone

    def __bool__(self) -> bool:
        """Whether a job is waiting."""
        return bool(self._queues)

    def add(self, model: Model, job: Job) -> None:
        """Let the job wait for its next steps. A session must not have two jobs at once: they would share a state."""
        self._queues.setdefault((model, job.alone), {}).setdefault(job.tenant, deque()).append(job)

    def waiting(self) -> Iterator[Job]:
        """All that wait, in no order."""
        for tenants in self._queues.values():
            for queue in tenants.values():
                yield from queue

    def take(self) -> tuple[Model, list[tuple[Job, int]]]:
        """The next tick, all of one model: jobs, and how many of its next steps each has in it.

        Abandoned jobs are left out, so there may be none. Raises StopIteration if no job waits.
        """
        turn = model, alone = next(iter(self._queues))
        tenants, shares, room = self._queues.pop(turn), list[tuple[Job, int]](), 1 if alone else self._max_tick_sessions
        served = list(tenants)
        if len(served) > 1:
            wanted = {tenant: _wanted(queue, room) for tenant, queue in tenants.items()}
            tenants = {tenant: queue for tenant, queue in tenants.items() if wanted[tenant]}
            served = sorted(islice(tenants, room), key=wanted.__getitem__)
        for others, tenant in zip(reversed(range(len(served))), served, strict=True):
            queue = tenants.pop(tenant)
            room -= _take_up_to(room // (others + 1), queue, shares)
            if queue:
                tenants[tenant] = queue
        if tenants:
            self._queues[turn] = tenants
        return model, shares


def _wanted(queue: Iterable[StepJob], most: int) -> int:
    """How many steps a tick could take of these, as far as it matters."""
    wanted = 0
    for job in queue:
        wanted += job.ready
        if wanted >= most:
            return most
    return wanted


def _take_up_to(most: int, queue: deque[Job], shares: list[tuple[Job, int]]) -> int:
    """Take so many steps at most; how many it were."""
    room = most
    while queue and room:
        job = queue.popleft()
        if steps := min(job.ready, room):
            job.taken += steps
            room -= steps
            shares.append((job, steps))
    return most - room
