"""Where whole sequences are computed, a process of its own or a thread in that of the lane, and what runs there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle, load_bundle
from service.engine.executor import Floats, run_sequences


def spawn(threads: int, niceness: int) -> Executor:
    """A process that computes beside this one, so that this one's event loop never waits for it."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(threads, niceness))


def begin_thread(threads: int) -> Executor:
    """A thread, in a process that does nothing else."""
    return ThreadPoolExecutor(1, "sequences", initializer=torch.set_num_threads, initargs=(threads,))


def end(executor: Executor) -> None:
    """At once, whatever it computes; a thread ends with its process."""
    for process in list((getattr(executor, "_processes", None) or {}).values()):  # `kill_workers` from Python 3.14 on
        process.kill()
    executor.shutdown(wait=isinstance(executor, ProcessPoolExecutor), cancel_futures=True)


def _begin(threads: int, niceness: int) -> None:
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


_bundles: dict[Path, Bundle] = {}


def load(folders: list[Path]) -> None:
    """Load these bundles now, as they are on the disk."""
    _bundles.update({folder: load_bundle(folder) for folder in folders})


def forget(folder: Path) -> None:
    """Give its memory back."""
    _bundles.pop(folder, None)


def run(folder: Path, sequences: list[NDArray[np.generic]]) -> list[Floats]:
    """Run whole sequences through the bundle of that folder."""
    if folder not in _bundles:  # after the death of a process that had it
        load([folder])
    return run_sequences(_bundles[folder].predictor, sequences)
