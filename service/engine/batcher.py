"""Which sessions share the next tick. Knows jobs, their order and fairness; no torch, no gRPC, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Model = TypeVar("Model")
Job = TypeVar("Job", bound="StepJob")


@dataclass(eq=False, slots=True)
class StepJob:
    """Steps of one session in a row, of which a tick applies one.

    inputs (steps, features) or (steps,), row (row_size,): the state after the steps that are done.
    """

    inputs: NDArray[np.generic]
    row: Row
    outputs: list[Row] = field(default_factory=list)
    abandoned: bool = False

    @property
    def next_input(self) -> NDArray[np.generic]:
        """The step that the next tick applies: (features,) or ()."""
        step: NDArray[np.generic] = self.inputs[len(self.outputs)]
        return step

    @property
    def done(self) -> bool:
        return len(self.outputs) == len(self.inputs)

    def apply(self, output: Row, row: Row) -> None:
        """Keep what a tick gave for `next_input`."""
        self.outputs.append(output)
        self.row = row


class Batcher(Generic[Model, Job]):
    """First come, first served, one step at a time.

    A job that has more steps goes to the end of its model's queue after each one, so a long job delays a short one
    by at most one tick. Models take turns.
    """

    def __init__(self, max_tick_sessions: int) -> None:
        self._max_tick_sessions = max_tick_sessions
        self._queues: dict[Model, deque[Job]] = {}  # only models with jobs, the one whose turn it is first

    def __bool__(self) -> bool:
        """Whether a job is waiting."""
        return bool(self._queues)

    def add(self, model: Model, job: Job) -> None:
        """Let the job wait for its next step. A session must not have two jobs at once: they would share a state."""
        self._queues.setdefault(model, deque()).append(job)

    def take(self) -> tuple[Model, list[Job]]:
        """The jobs of the next tick, all of one model; abandoned ones are left out, so there may be none.

        Raises StopIteration if no job waits.
        """
        model = next(iter(self._queues))
        queue = self._queues.pop(model)
        batch = [queue.popleft() for _ in range(min(len(queue), self._max_tick_sessions))]
        if queue:
            self._queues[model] = queue
        return model, [job for job in batch if not job.abandoned]
