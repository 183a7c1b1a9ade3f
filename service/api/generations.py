"""Which calls write with one-to-many models: no more than may, and none with a model that is served no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from models.manifest import ModelKey
from service.api.live_call import LiveCall
from service.errors import ModelNotFound, QueueFull

RETRY_AFTER_S = 1.0


class GenerationMetrics(Protocol):
    """Where generations are counted."""

    def generations(self, model: ModelKey, running: int) -> None:
        """So many of the model run."""
        ...

    def generation_ended(self, model: ModelKey, finish: str) -> None:
        """One is over, and why."""
        ...

    def symbol_generated(self, model: ModelKey) -> None:
        """A symbol was drawn that is part of an output."""
        ...


class Generations:
    """Those that run."""

    def __init__(self, max_running: int, metrics: GenerationMetrics) -> None:
        self.running_elsewhere = 0  # in other processes of the same service
        self._max_running = max_running
        self._metrics = metrics
        self._running: dict[LiveCall, ModelKey] = {}

    @property
    def running(self) -> int:
        """How many there are in this process."""
        return len(self._running)

    def running_of(self, model: ModelKey) -> int:
        """How many of the model."""
        return sum(key == model for key in self._running.values())

    @contextmanager
    def place(self, call: LiveCall, model: ModelKey) -> Iterator[None]:
        """Of a call, while it runs. Raises QueueFull."""
        running = self.running + self.running_elsewhere
        if running >= self._max_running:
            raise QueueFull(
                f"{running} generations run (max_generations)", retry_after_s=RETRY_AFTER_S, limit=self._max_running
            )
        self._running[call] = model
        self._metrics.generations(model, self.running_of(model))
        try:
            yield
        finally:
            del self._running[call]
            self._metrics.generations(model, self.running_of(model))

    def retire(self, model: ModelKey) -> None:
        """The model is served no more: what it writes ends."""
        for call, key in self._running.items():
            if key == model:
                name, version = model
                call.lose(ModelNotFound(f"model {name!r}, version {version}, was unloaded", field="model", model=name))
