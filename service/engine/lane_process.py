"""Where whole sequences are computed, a process of its own or a thread in that of the lane, and what runs there."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle, load_bundle
from service.engine.executor import Floats, run_sequences

Argument = TypeVar("Argument")
Result = TypeVar("Result")

OF_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that a terminal or a service manager sends to all processes at once; when to end is for the parent to say."""


def spawn(threads: int, niceness: int) -> Executor:
    """A process that computes beside this one, so that this one's event loop never waits for it."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(threads, niceness))


def begin_thread(threads: int) -> Executor:
    """A thread, in a process that does nothing else."""
    return ThreadPoolExecutor(1, "sequences", initializer=torch.set_num_threads, initargs=(threads,))


def submit(executor: Executor, work: Callable[[Argument], Result], argument: Argument) -> asyncio.Future[Result]:
    """Let it be done there. A process that this starts never hears of `OF_THE_PARENT`."""
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_PARENT)
    try:
        return asyncio.wrap_future(executor.submit(work, argument))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def end(executor: Executor) -> None:
    """At once, whatever it computes; a thread ends with its process."""
    for process in list((getattr(executor, "_processes", None) or {}).values()):  # `kill_workers` from Python 3.14 on
        process.kill()
    executor.shutdown(wait=isinstance(executor, ProcessPoolExecutor), cancel_futures=True)


def _begin(threads: int, niceness: int) -> None:
    """Set up the process once, before its first work."""
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


def run(batch: tuple[Path, list[NDArray[np.generic]]]) -> list[Floats]:
    """Run whole sequences through the bundle of a folder."""
    folder, sequences = batch
    if folder not in _bundles:  # after the death of a process that had it
        load([folder])
    return run_sequences(_bundles[folder].predictor, sequences)
