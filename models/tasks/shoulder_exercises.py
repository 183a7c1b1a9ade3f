"""The shoulder exercise recordings of a smartwatch (Burns et al., 2018): ten people, both arms, seven exercises."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from numpy.typing import NDArray

from models.data import Archive, read_member
from models.training.sequences import Recording

ARCHIVE = Archive(
    package="seglearn",
    version="1.2.5",
    filename="seglearn-1.2.5-py3-none-any.whl",
    sha256="ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd",
)
MEMBER = "seglearn/data/watch_dataset.npy"
FEATURES = ("ax", "ay", "az", "wx", "wy", "wz")  # acceleration and angular velocity along three axes
EXERCISES = {
    "PEN": "pendulum",
    "ABD": "abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation",
    "ER": "external rotation",
    "TRAP": "trapezius extension",
    "ROW": "upright row",
}
STEPS_PER_SECOND = 25  # recorded at 50


@cache
def recordings() -> tuple[Recording, ...]:
    """All 140, at 25 steps a second, in the order of the file; the group is the person, 1 to 10."""
    # A pickle, which is why nothing of the archive is read before its digest is checked.
    content = np.load(io.BytesIO(read_member(ARCHIVE, MEMBER)), allow_pickle=True).item()
    rows = zip(content["X"], content["y"], content["subject"], content["side"], strict=True)
    return tuple(
        Recording(halve_rate(values), int(exercise), f"person {person}, {'right' if side else 'left'} arm", int(person))
        for values, exercise, person, side in rows
    )


def halve_rate(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """(steps, features) -> (steps // 2, features): the mean of each two, which also tames what is too fast to keep."""
    pairs = values[: len(values) // 2 * 2].reshape(-1, 2, values.shape[1])
    return np.asarray(pairs.mean(axis=1), dtype=np.float32)
