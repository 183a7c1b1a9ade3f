"""What a recording truly is, as the text that stands in a manifest, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.training.sequences import Target


def target_text(target: Target, labels: Sequence[str]) -> str:
    """A label, a number, or labels in a row: joined as they are where each is one character, else by blanks."""
    if isinstance(target, np.ndarray):
        return _joint(labels).join(labels[label] for label in target.tolist())
    return labels[target] if isinstance(target, int) else f"{target:g}"


def target_of(text: str, labels: Sequence[str], *, is_row: bool) -> Target:
    """The inverse; `is_row` where there may be several labels. Raises ValueError."""
    if not labels:
        return float(text)
    if not is_row:
        return labels.index(text)
    parts = text.split(" ") if _joint(labels) else list(text)
    return np.array([labels.index(part) for part in parts], dtype=np.int64)


def _joint(labels: Sequence[str]) -> str:
    return "" if all(len(label) == 1 for label in labels) else " "
