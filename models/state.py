"""The state of a session as one flat row, so that a snapshot, a parked session and a batch hold the same values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StateLayout(NamedTuple):
    """Where the values of a network's layers lie in its row: layer by layer, h first, then c where there is one."""

    layers: int
    values_per_layer: int
    hidden_size: int

    @property
    def size(self) -> int:
        """Width of the row, in float32 values."""
        return self.layers * self.values_per_layer * self.hidden_size


def initial_state(batch: int, layout: StateLayout) -> Tensor:
    """The state before the first step: (batch, layout.size) zeros."""
    return torch.zeros(batch, layout.size)


def unpack_state(state: Tensor, layout: StateLayout) -> list[tuple[Tensor, ...]]:
    """(batch, layout.size) -> for each layer its values (h,) or (h, c), each (batch, hidden)."""
    pieces = torch.split(state, layout.hidden_size, dim=-1)
    return [pieces[i : i + layout.values_per_layer] for i in range(0, len(pieces), layout.values_per_layer)]


def pack_state(values: list[tuple[Tensor, ...]]) -> Tensor:
    """The inverse of `unpack_state`: -> (batch, layout.size)."""
    return torch.cat([value for layer in values for value in layer], dim=-1)
