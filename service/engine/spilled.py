"""Recordings: sequences that come in parts and are too long for memory. What a network makes of one lies in files.

The files have no name, so that they are gone with the process whatever becomes of it. They are mapped, and so look like
any other array to a tick; the pages that it has touched are given back every so many ticks.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.engine.sequence_engine import Ended, SequenceEngine
from service.engine.sequence_network import Floats, SequenceNetwork
from service.errors import DiskFull, ExecutionFailed, ServingError

AT_ONCE_STEPS = 4_096  # read or answered between two ticks
TICKS_BETWEEN_DROPS = 64
RETRY_AFTER_S = 10.0


class Record(NamedTuple):
    """A recording through the bundle of a folder begins."""

    number: int
    folder: Path


class Store(NamedTuple):
    """Its next steps: (steps, features) or (steps,)."""

    number: int
    steps: NDArray[np.generic]


class Compute(NamedTuple):
    """There are no more; told once all of it is computed."""

    number: int


class HowFar(NamedTuple):
    """Told a Progress."""

    number: int


class Read(NamedTuple):
    """Told the next Piece of the answer, about so many steps at most; with `last_only` only the last row is in one."""

    number: int
    max_steps: int
    last_only: bool


RecordingOrder: TypeAlias = Record | Store | Compute | HowFar | Read


class Progress(NamedTuple):
    """Of a recording: `computed` of `total` steps in all lanes of all stages; `total` is 0 until the last part."""

    received_steps: int
    computed_steps: int
    total_steps: int


class Piece(NamedTuple):
    """Outputs (steps, outputs), or (1, outputs) about the whole or the last step; None = this piece has none."""

    outputs: Floats | None
    more: bool


class Ask(NamedTuple):
    """An order that is answered, by a Told with the same number of the call."""

    call: int
    order: RecordingOrder


class Told(NamedTuple):
    """The answer, if any; or what went wrong, a fault of ours where it is text, which ends the recording."""

    call: int
    answer: Progress | Piece | None = None
    error: ServingError | str | None = None


class _Rows:
    """float32 (rows, width) in a file that grows until it is mapped. Raises OSError."""

    def __init__(self, folder: Path | None, width: int) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed once it is mapped
        self._width = width
        self._row_bytes = width * np.dtype(np.float32).itemsize
        self._rows = 0

    def grow(self, rows: int) -> None:
        """By so many: where the disk has no room for them, it says so here, and not when they are first touched."""
        os.posix_fallocate(self._file.fileno(), self._rows * self._row_bytes, rows * self._row_bytes)
        self._rows += rows

    def append(self, values: Floats) -> None:
        """(steps, width)."""
        rest, offset = memoryview(values.tobytes()), self._rows * self._row_bytes
        self.grow(len(values))
        while rest:
            written = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[written:], offset + written

    def map(self) -> Floats:
        """All of them."""
        self._map = mmap.mmap(self._file.fileno(), self._rows * self._row_bytes)
        self._file.close()
        return np.frombuffer(self._map, np.float32).reshape(self._rows, self._width)

    def drop_pages(self) -> None:
        """What was touched of the map is the file's, and no longer ours."""
        self._map.madvise(mmap.MADV_DONTNEED)


class Spilled:
    """One recording, outside of memory. Raises OSError."""

    def __init__(self, network: SequenceNetwork, folder: Path | None) -> None:
        self.network = network
        self.received_steps = 0
        self.computed_steps = 0  # in all lanes of all stages, once all of them are
        self._folder = folder
        self._last: Tensor | None = None
        self._inputs: _Rows | None = None
        width = network.hidden_size * network.lanes[0]
        self._outputs = [_Rows(folder, width) for _ in network.stages[:2]]  # a stage reads one and writes the other
        self._hidden: Floats | None = None
        self._sum = np.zeros(width)
        self._answered_steps = 0

    def store(self, steps: NDArray[np.generic]) -> None:
        """The next ones: (steps, features) or (steps,)."""
        self._read(steps)
        self.received_steps += len(steps)

    def _read(self, steps: NDArray[np.generic]) -> None:
        for begin in range(0, len(steps), AT_ONCE_STEPS):
            part, self._last = self.network.read_on(steps[begin : begin + AT_ONCE_STEPS], self._last)
            if self._inputs is None:
                self._inputs = _Rows(self._folder, part.shape[1])
            self._inputs.append(part)
            for rows in self._outputs:
                rows.grow(len(part))

    def map(self) -> tuple[Floats, Callable[[], Floats]]:
        """What the network has read, and the room for the outputs of each of its stages in turn.

        (steps + look_ahead, width): the padding behind the last step, too.
        """
        if self._inputs is None:
            raise ValueError("there is no step")
        self._read(self.network.padding)
        outputs = itertools.cycle([rows.map() for rows in self._outputs])
        return self._inputs.map(), lambda: next(outputs)

    def computed(self, hidden: Floats) -> None:
        """(steps, hidden * directions) of the last stage."""
        self._hidden = hidden
        self.computed_steps = (len(hidden) + len(self.network.padding)) * sum(self.network.lanes)

    def read(self, max_steps: int, *, last_only: bool) -> Piece:
        """The next piece of the answer. Raises ExecutionFailed where it is not finite."""
        if self._hidden is None:
            raise ValueError("it is not computed yet")
        hidden = self._hidden[self._answered_steps :][: min(max_steps, AT_ONCE_STEPS)]
        self._answered_steps += len(hidden)
        more = self._answered_steps < len(self._hidden)
        if self.network.answers_about_mean:
            self._sum += hidden.sum(axis=0, dtype=np.float64)
            if more:
                return Piece(None, more)
            hidden = (self._sum / len(self._hidden)).astype(np.float32)[np.newaxis]
        outputs = self.network.answer(hidden)
        if not np.isfinite(outputs).all():
            raise ExecutionFailed("the sequence leads to a value that is not finite")
        if last_only:
            return Piece(None if more else outputs[-1:], more)
        return Piece(outputs, more)

    def drop_pages(self) -> None:
        """Give back what it has in memory."""
        for rows in (self._inputs, *self._outputs):
            if rows is not None:
                rows.drop_pages()


class Recorder:
    """Obeys the orders about recordings, which are computed by an engine among its other sequences."""

    def __init__(
        self,
        engine: SequenceEngine,
        find: Callable[[Path], SequenceNetwork],
        tell: Callable[[Told], None],
        folder: Path | None,
    ) -> None:
        """`find` gives the network of a bundle's folder; the files are in `folder`, None = where temporary ones go."""
        self._engine = engine
        self._find = find
        self._tell = tell
        self._folder = folder
        self._spilled: dict[int, Spilled] = {}
        self._computing: dict[int, int] = {}  # the number of the call, by that of the recording
        self._ticks = 0

    def obey(self, ask: Ask) -> None:
        """Now; only what Compute asks for takes longer. Whatever goes wrong ends that recording."""
        try:
            told = self._do(ask)
        except Exception as error:
            self.abandon(ask.order.number)
            told = Told(ask.call, error=_refusal(error))
        if told is not None:
            self._tell(told)

    def _do(self, ask: Ask) -> Told | None:
        match ask.order:
            case Record(number, folder):
                self._spilled[number] = Spilled(self._find(folder), self._folder)
            case Store(number, steps):
                self._spilled[number].store(steps)
            case Compute(number):
                spilled = self._spilled[number]
                inputs, room = spilled.map()
                self._engine.add_read(number, spilled.network, inputs, room)
                self._computing[number] = ask.call
                return None
            case HowFar(number):
                return Told(ask.call, self._progress(number))
            case Read(number, max_steps, last_only):
                spilled = self._spilled[number]
                piece = spilled.read(max_steps, last_only=last_only)
                spilled.drop_pages()
                return Told(ask.call, piece)
        return Told(ask.call)

    def _progress(self, number: int) -> Progress:
        spilled = self._spilled[number]
        if number in self._computing:
            return Progress(spilled.received_steps, *self._engine.progress(number))
        return Progress(spilled.received_steps, spilled.computed_steps, spilled.computed_steps)

    def abandon(self, number: int) -> None:
        """Nobody wants it, or another sequence, any more: memory and files are free. One that has ended is none."""
        self._engine.abandon(number)
        self._spilled.pop(number, None)
        self._computing.pop(number, None)

    def ticked(self, ended: list[Ended]) -> list[Ended]:
        """After each tick: those that ended with it and are no recordings."""
        self._ticks += 1
        if self._ticks % TICKS_BETWEEN_DROPS == 0:
            for number in self._computing:
                self._spilled[number].drop_pages()
        return [end for end in ended if not self._is_recording(end)]

    def _is_recording(self, ended: Ended) -> bool:
        call = self._computing.pop(ended.number, None)
        if call is None:
            return False
        if isinstance(ended.outcome, np.ndarray):
            self._spilled[ended.number].computed(ended.outcome)
            self._spilled[ended.number].drop_pages()
            self._tell(Told(call))
        else:
            self.abandon(ended.number)
            self._tell(Told(call, error=str(ended.outcome)))
        return True


def _refusal(error: Exception) -> ServingError | str:
    if isinstance(error, ServingError):
        return error.with_traceback(None)  # which knows arrays of the files
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull("there is no room on the server's disk for this sequence", retry_after_s=RETRY_AFTER_S)
    return repr(error)
