"""One stream's state and the index of its next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.step_engine import StepEngine
from service.errors import ExecutionFailed, StepOutOfOrder


class StepMetrics(Protocol):
    """Where applied steps are counted."""

    def steps(self, model: ModelKey, applied: int) -> None:
        """So many steps entered the state of a session of the model."""
        ...


@dataclass(frozen=True)
class AppliedSteps:
    """outputs (applied, outputs) of the steps from `first_step` on, and why the next one failed, if it did."""

    first_step: int
    outputs: NDArray[np.float32]
    failure: ExecutionFailed | None


class Session:
    """Applies each step index once, in order. Not safe for two callers at a time: a session has one stream."""

    def __init__(self, session_id: str, model: ModelKey, engine: StepEngine, metrics: StepMetrics) -> None:
        self.session_id = session_id
        self.model = model
        self.next_step = 0
        self._engine = engine
        self._metrics = metrics
        self._row = engine.initial_row(model)

    async def apply(self, first_step: int, inputs: NDArray[np.generic]) -> AppliedSteps:
        """Apply (steps, features) or (steps,) of validated inputs.

        Raises StepOutOfOrder. Whatever fails or is cancelled, the state is that after `next_step - 1`.
        """
        self._expect(first_step)
        result = await self._engine.step(self.model, inputs, self._row)
        applied = len(result.outputs)
        self._row = result.row
        self.next_step += applied
        self._metrics.steps(self.model, applied)
        return AppliedSteps(first_step, result.outputs, result.failure)

    def reset(self, first_step: int) -> None:
        """Back to the initial state before the step of that index. Raises StepOutOfOrder."""
        self._expect(first_step)
        self._row = self._engine.initial_row(self.model)

    def _expect(self, first_step: int) -> None:
        if first_step != self.next_step:
            raise StepOutOfOrder(
                f"the next step of session {self.session_id!r} is {self.next_step}, not {first_step}",
                field="first_step",
                expected_step=self.next_step,
            )
