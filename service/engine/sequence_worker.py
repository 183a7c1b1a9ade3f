"""Where whole sequences are computed, a process of its own or a thread in that of the lane, and what runs there.

Orders go in, news come out, between any two ticks; nobody waits for anybody but for what there is to compute.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from models.beam import Decoding
from models.bundle import Bundle
from models.manifest import ModelKey
from service import logs
from service.engine.sequence_engine import Ended, SequenceEngine
from service.engine.sequence_network import SequenceNetwork
from service.engine.spilled import Ask, Recorder, Told
from service.logs import LogSettings

MAX_TICK_STEPS = 128
"""As `python -m benchmarks.ticks` and `benchmarks.sequences` have shown; see docs/engine.md."""

QUIET_S = 0.1
"""Ticks after which no sequence has ended are told of together: hearing of one costs the service as much as a step."""

OF_THE_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that a terminal or a service manager sends to all processes at once; when to end is for the parent to say."""


class Load(NamedTuple):
    """The bundles of these folders, as they are on the disk."""

    folders: list[Path]


class Forget(NamedTuple):
    """The bundle of this folder, once no sequence needs it."""

    folder: Path


class Begin(NamedTuple):
    """A sequence, (steps, features) or (steps,), through the bundle of a folder."""

    number: int
    folder: Path
    sequence: NDArray[np.generic]
    decoding: Decoding | None = None


class Abandon(NamedTuple):
    """A sequence or a recording that nobody wants any more."""

    number: int


class SetLogLevel(NamedTuple):
    """Of the process that obeys."""

    level: str


Order: TypeAlias = Load | Forget | Begin | Abandon | Ask | SetLogLevel


class Obeyed(NamedTuple):
    """That was a Load or a Forget; what it raised, if anything."""

    error: Exception | None


class Shared(NamedTuple):
    """So many sequences of a model shared a tick; of the steps that were computed, `padding` were behind an end."""

    model: ModelKey
    sequences: int
    duration_s: float
    steps: int
    padding: int


class Ticked(NamedTuple):
    """What ticks there were since the last news of this kind, and the sequences that ended with them."""

    ticks: list[Shared]
    ended: list[Ended]


News: TypeAlias = Obeyed | Ended | Ticked | Told
Hear: TypeAlias = Callable[[News], None]
LoadBundle: TypeAlias = Callable[[Path], Bundle]


class Orders(Protocol):
    """What is to be done, one after the other."""

    def get(self) -> Order: ...
    def empty(self) -> bool: ...


class Worker(Protocol):
    """Computes sequences, somewhere."""

    def listen(self, hear: Hear, died: Callable[[], None]) -> None:
        """Once, on an event loop, which calls them."""
        ...

    def send(self, order: Order) -> None:
        """Without waiting."""
        ...

    def end(self) -> None:
        """At once, whatever it computes; a thread ends with its process."""
        ...


class ProcessWorker:
    """A process that computes beside this one, so that this one's event loop never waits for it."""

    def __init__(
        self,
        max_tick_sequences: int,
        threads: int,
        load: LoadBundle,
        spill_dir: Path | None = None,
        *,
        niceness: int = 0,
    ) -> None:
        """`load` is for the bundle of a folder. Recordings are kept in `spill_dir`; None = where temporary files go."""
        context = multiprocessing.get_context("spawn")
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        given, pipe = context.Pipe(duplex=False)
        self._news, told = context.Pipe(duplex=False)
        arguments = given, told, max_tick_sequences, threads, load, spill_dir, niceness, logs.configured()
        self._process = context.Process(target=_in_process, args=arguments, daemon=True)
        resource_tracker.ensure_running()  # where start() does that, it unblocks signals
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_PARENT)  # the process inherits that it hears of none
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        given.close()
        told.close()
        threading.Thread(target=_pass_on, args=(self._orders, pipe), name="lane's orders", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def listen(self, hear: Hear, died: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(loop, hear, died), name="lane's news", daemon=True).start()

    def _listen(self, loop: asyncio.AbstractEventLoop, hear: Hear, died: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            with suppress(EOFError, OSError):
                while self._news in wait([self._news, self._process.sentinel]):
                    loop.call_soon_threadsafe(hear, self._news.recv())
            self._orders.put(None)
            loop.call_soon_threadsafe(died)

    def send(self, order: Order) -> None:
        self._orders.put(order)

    def end(self) -> None:
        self._process.kill()
        self._process.join()


class ThreadWorker:
    """A thread, in a process that does nothing else."""

    def __init__(self, max_tick_sequences: int, threads: int, load: LoadBundle, spill_dir: Path | None = None) -> None:
        """As ProcessWorker has it."""
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._settings = max_tick_sequences, threads, load, spill_dir

    def listen(self, hear: Hear, died: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def tell(news: News) -> None:
            loop.call_soon_threadsafe(hear, news)

        def run() -> None:
            with suppress(RuntimeError):  # the loop is closed
                try:
                    work(self._orders, tell, *self._settings)
                finally:
                    loop.call_soon_threadsafe(died)

        threading.Thread(target=run, name="sequences", daemon=True).start()

    def send(self, order: Order) -> None:
        self._orders.put(order)

    def end(self) -> None:
        pass


def _pass_on(orders: queue.SimpleQueue[Order | None], pipe: Connection) -> None:
    """Until None, in a thread: a pipe may be full. A multiprocessing.Queue would leave semaphores at os._exit."""
    with pipe, suppress(OSError):  # the process is dead
        while order := orders.get():
            pipe.send(order)


class _FromPipe:
    """Orders that another process passes on."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def get(self) -> Order:
        order: Order = self._pipe.recv()
        return order

    def empty(self) -> bool:
        return not self._pipe.poll()


def _in_process(
    given: Connection,
    told: Connection,
    max_tick_sequences: int,
    threads: int,
    load: LoadBundle,
    spill_dir: Path | None,
    niceness: int,
    log_settings: LogSettings,
) -> None:
    logs.configure(log_settings)
    os.nice(niceness)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError):  # the parent is dead
        work(_FromPipe(given), told.send, max_tick_sequences, threads, load, spill_dir)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def work(
    orders: Orders, tell: Hear, max_tick_sequences: int, threads: int, load: LoadBundle, spill_dir: Path | None
) -> None:
    """Obey and compute until the end of the process."""
    torch.set_num_threads(threads)
    engine, networks = SequenceEngine(max_tick_sequences, MAX_TICK_STEPS), dict[Path, SequenceNetwork]()
    find = partial(_find, networks, load)
    recorder = Recorder(engine, find, tell, spill_dir)
    ticks, told_s = list[Shared](), time.monotonic()
    while True:
        while not engine or not orders.empty():
            match orders.get():
                case Load(folders):
                    tell(_load(folders, networks, load))
                case Forget(folder):
                    networks.pop(folder, None)
                    tell(Obeyed(None))
                case Begin() as begin:
                    if failed := _begin(begin, engine, find):
                        tell(failed)
                case Abandon(number):
                    recorder.abandon(number)
                case Ask() as ask:
                    recorder.obey(ask)
                case SetLogLevel(level):
                    logs.set_level(level)
        ended = _tick(engine, recorder, ticks)
        if ended or not engine or time.monotonic() > told_s + QUIET_S:
            tell(Ticked(ticks, ended))
            ticks, told_s = [], time.monotonic()


def _tick(engine: SequenceEngine, recorder: Recorder, ticks: list[Shared]) -> list[Ended]:
    """One more of them. A function, so that nothing here holds what has ended."""
    tick = engine.tick()
    ticks.append(Shared(tick.network.model, tick.sequences, tick.duration_s, tick.steps, tick.padding))
    return recorder.ticked(tick.ended)


def _load(folders: list[Path], networks: dict[Path, SequenceNetwork], load: LoadBundle) -> Obeyed:
    try:
        networks.update({folder: _network(load(folder)) for folder in folders})
    except Exception as error:
        return Obeyed(error)
    return Obeyed(None)


def _find(networks: dict[Path, SequenceNetwork], load: LoadBundle, folder: Path) -> SequenceNetwork:
    if folder not in networks:  # after the death of a process that had it
        networks[folder] = _network(load(folder))
    return networks[folder]


def _network(bundle: Bundle) -> SequenceNetwork:
    return SequenceNetwork(bundle.predictor, bundle.manifest.key)


def _begin(begin: Begin, engine: SequenceEngine, find: Callable[[Path], SequenceNetwork]) -> Ended | None:
    try:
        engine.add(begin.number, find(begin.folder), begin.sequence, begin.decoding)
    except Exception as error:
        return Ended(begin.number, repr(error))
    return None
