"""The networks behind the ticks: pure functions from inputs and states to outputs and states. No queues."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models.predictor import Predictor
from service.engine.step_kernel import StepKernel

Floats = NDArray[np.float32]


class StepExecutor(Protocol):
    """One step of each of several sessions."""

    @property
    def row_size(self) -> int:
        """Width of a session's state, in float32 values; the initial state is all zeros."""
        ...

    def step(self, inputs: NDArray[np.generic], rows: Floats) -> tuple[Floats, Floats]:
        """inputs (batch, features) or (batch,), rows (batch, row_size) -> outputs (batch, outputs), new rows."""
        ...


CPU = torch.device("cpu")


def usable_device(name: str) -> torch.device:
    """Raises ValueError, which says why torch cannot compute there."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return torch.device(name)


class TorchExecutor:
    """A StepExecutor that runs a bundle's own network with torch."""

    def __init__(self, predictor: Predictor, device: torch.device = CPU) -> None:
        predictor.to(device)
        self._device = device
        self._kernel = StepKernel(predictor)
        self.row_size = predictor.row_size

    def step(self, inputs: NDArray[np.generic], rows: Floats) -> tuple[Floats, Floats]:
        """As StepExecutor has it."""
        there = torch.from_numpy(inputs).to(self._device), torch.from_numpy(rows).to(self._device)
        outputs, new_rows = self._kernel.step(*there)
        return outputs.cpu().numpy(), new_rows.cpu().numpy()
