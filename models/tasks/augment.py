"""Ways to vary a recording so that a network cannot learn it by heart. Each takes and gives (steps, features)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


def stretch(values: Values, factor: float) -> Values:
    """The same, `factor` times as long, read between the steps along straight lines."""
    at = np.linspace(0, len(values) - 1, max(1, round(len(values) * factor)))
    before = at.astype(int)
    after = np.minimum(before + 1, len(values) - 1)
    share = (at - before)[:, None]
    return np.asarray(values[before] * (1 - share) + values[after] * share, dtype=np.float32)


def rotation(axis: NDArray[np.float64], angle: float) -> Values:
    """The (3, 3) matrix that turns about an axis by an angle in radians, by Rodrigues' formula."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross, dtype=np.float32)
