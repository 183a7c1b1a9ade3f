"""Which steps share the next tick. Knows jobs, their order and fairness; no torch, no gRPC, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Model = TypeVar("Model")
Job = TypeVar("Job", bound="StepJob")


@dataclass(eq=False, slots=True)
class StepJob:
    """Steps that wait for ticks: inputs (steps, features) or (steps,).

    Those of one session go in turn, each to a tick of its own. Those of as many sessions may share one.
    """

    inputs: NDArray[np.generic]
    in_turn: bool
    taken: int = 0  # steps that ticks have had
    abandoned: bool = False

    @property
    def left(self) -> int:
        """How many steps still wait."""
        return 0 if self.abandoned else len(self.inputs) - self.taken

    @property
    def ready(self) -> int:
        """How many of them one tick may take."""
        return min(self.left, 1) if self.in_turn else self.left


class Batcher(Generic[Model, Job]):
    """First come, first served.

    A job that has more steps than a tick takes goes to the end of its model's queue, so a long job, or one of many
    sessions, delays a short one by at most one tick. Models take turns.
    """

    def __init__(self, max_tick_sessions: int) -> None:
        self._max_tick_sessions = max_tick_sessions
        self._queues: dict[Model, deque[Job]] = {}  # only models with jobs, the one whose turn it is first

    def __bool__(self) -> bool:
        """Whether a job is waiting."""
        return bool(self._queues)

    def add(self, model: Model, job: Job) -> None:
        """Let the job wait for its next steps. A session must not have two jobs at once: they would share a state."""
        self._queues.setdefault(model, deque()).append(job)

    def take(self) -> tuple[Model, list[tuple[Job, int]]]:
        """The next tick, all of one model: jobs, and how many of its next steps each has in it.

        Abandoned jobs are left out, so there may be none. Raises StopIteration if no job waits.
        """
        model = next(iter(self._queues))
        queue, shares, room = self._queues.pop(model), list[tuple[Job, int]](), self._max_tick_sessions
        while queue and room:
            job = queue.popleft()
            if steps := min(job.ready, room):
                job.taken += steps
                room -= steps
                shares.append((job, steps))
        if queue:
            self._queues[model] = queue
        return model, shares
