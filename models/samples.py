"""The held-out recordings that ship with a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.manifest import Sample


def read_sample(folder: Path, sample: Sample) -> NDArray[np.float32] | str:
    """(steps, features) from a CSV file with a header line, or the text of a text file, of a bundle's folder."""
    file = folder / sample.file
    if file.suffix == ".txt":
        return file.read_text(encoding="utf-8").rstrip("\n")
    return np.loadtxt(file, dtype=np.float32, delimiter=",", skiprows=1, ndmin=2)
