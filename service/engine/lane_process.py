"""What runs inside the process for whole sequences."""

from __future__ import annotations

import functools
import os
import signal
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle, load_bundle
from service.engine.executor import Floats, run_sequences


def start(threads: int, niceness: int) -> None:
    """Set up the process once, before its first work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.nice(niceness)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@functools.cache
def _bundle(folder: Path) -> Bundle:
    return load_bundle(folder)


def load(folders: list[Path]) -> None:
    """Load these bundles now."""
    for folder in folders:
        _bundle(folder)


def run(folder: Path, sequences: list[NDArray[np.generic]]) -> list[Floats]:
    """Run whole sequences through the bundle of that folder."""
    return run_sequences(_bundle(folder).predictor, sequences)
