"""What a lane for whole sequences refuses, be it in this process or in its own."""

from __future__ import annotations

from service.errors import LaneLost, QueueFull

RETRY_AFTER_S = 1.0


def full(waiting: int, more: int, limit: int) -> QueueFull:
    """The refusal of more sequences than may wait."""
    return QueueFull(
        f"{waiting} sequences wait; with {more} more there would be over {limit}",
        retry_after_s=RETRY_AFTER_S,
        limit=limit,
    )


def lost() -> LaneLost:
    """The refusal of what the process held when it died."""
    return LaneLost("the process that computed the sequence died", retry_after_s=RETRY_AFTER_S)
