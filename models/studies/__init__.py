"""What the course says of recurrent networks, measured side by side: `python -m models compare STUDY`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from models.studies import adding, cells, depth, directions, ensemble, gradients, look_ahead

STUDIES: dict[str, Callable[[Path, int], Path]] = {
    "adding": adding.compare,
    "cells": cells.compare,
    "depth": depth.compare,
    "directions": directions.compare,
    "ensemble": ensemble.compare,
    "gradients": gradients.compare,
    "look-ahead": look_ahead.compare,
}
"""Each writes its page and picture into a folder, given a first seed too, and gives the page."""
