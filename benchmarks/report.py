"""How results are written down."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def machine() -> str:
    """What it ran on, in a line."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    cpus, python = f"{len(models)} × {models[0]}", f"Python {platform.python_version()}"
    return f"{cpus}, {platform.system()}, {python}, torch {torch.__version__}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
