"""One step of each of several sessions, in as few operations for each as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.step_engine import Stepped, TickJob
from service.sessions.session import Owner, Session

Applied = Callable[[int, Stepped, list[int], list[int]], None]
"""Called with the number of the first step that a tick had, what it gave, which of these were applied, and which of
those bring no answer yet because of a look-ahead.
"""


class StepsTogether(TickJob):
    """The next step of each of several sessions of one model and tenant, sent by their owners.

    A session that has another owner by the time that its step is computed stays as it is.
    """

    def __init__(
        self,
        inputs: NDArray[np.generic],
        sessions: Sequence[Session],
        owners: Sequence[Owner],
        applied: Applied,
        dropped: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """inputs (sessions, features) or (sessions,), in the order of the sessions; at least one."""
        places = np.array([session.state.place for session in sessions])
        super().__init__(inputs, False, sessions[0].key.tenant, places=places)
        self.model: ModelKey = sessions[0].model
        self._sessions = sessions
        self._owners = owners
        self._applied = applied
        self._dropped = dropped
        self._clock = clock

    def drop(self) -> None:
        self._dropped()

    def applied(self, stepped: Stepped, start: int, end: int) -> None:
        stepped = stepped.part(start, end)
        steps, failures, now_s = end - start, stepped.failures, self._clock()
        first = self.taken - steps
        outputs, row_bytes = stepped.outputs.tobytes(), stepped.outputs[0].nbytes
        look_ahead = self._sessions[0].look_ahead
        sessions, owners = self._sessions[first : self.taken], self._owners[first : self.taken]
        applied, silent = list[int](), list[int]()
        for i, (session, owner) in enumerate(zip(sessions, owners, strict=True)):
            if session.owner is owner and i not in failures:
                if not look_ahead:
                    session.ledger.applied_one(outputs[i * row_bytes : (i + 1) * row_bytes])
                elif not len(session.ledger.applied(stepped.outputs[i : i + 1])):
                    silent.append(i)
                session.used_s = now_s
                applied.append(i)
        self._keep(stepped, applied)
        self._applied(first, stepped, applied, silent)

    def _keep(self, stepped: Stepped, applied: list[int]) -> None:
        """The states after the steps that were applied."""
        places, rows = self.places_of_last(len(stepped.outputs)), self._sessions[0].state.array.rows
        if len(applied) == len(places):
            rows[places] = stepped.states
        elif applied:
            rows[places[applied]] = stepped.states[applied]
