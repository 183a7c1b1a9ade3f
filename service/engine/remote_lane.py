"""The lane for whole sequences of all workers, seen from one of them and from its own process.

Over a Unix socket, messages of msgpack with their length before them. A call has a number; its answer has the same. A
recording has the number of the call that began it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from models.beam import Decoding, Hypothesis
from models.bundle import Bundle
from service.engine.executor import Floats
from service.engine.lane_refusals import full, lost
from service.engine.recordings import Recording
from service.engine.sequence_lane import Lane
from service.engine.spilled import Piece, Progress
from service.errors import ExecutionFailed, ServingError, packed, unpacked

log = logging.getLogger(__name__)

LENGTH_BYTES = 8
CONNECT_AGAIN_S = 0.1
AWAY_S = 20.0  # longer than a lane needs to start


class RemoteLane:
    """Asks the lane's process. What it held when it died is LaneLost; what comes after that waits for the next."""

    def __init__(self, address: Path, *, max_waiting: int) -> None:
        """`max_waiting` sequences while it is gone; one more is QueueFull."""
        self._address = address
        self._max_waiting = max_waiting
        self._waiting = 0
        self._connected = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self.available = True  # the lane serves before we begin
        self.available_changed = asyncio.Event()
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}

    def queue_age_s(self) -> float:
        """0: the lane's process tells that itself."""
        return 0.0

    async def warm_up(self, folders: list[Path]) -> None:
        """The lane's process does that before the workers need it."""

    async def forget(self, folder: Path) -> None:
        """The lane's process does that when no worker needs it any more."""

    async def predict(self, bundle: Bundle, sequences: list[NDArray[np.generic]], *, wait: bool) -> list[Floats]:
        await self._until_connected(len(sequences))
        packed_sequences = [_packed(sequence) for sequence in sequences]
        outputs = await self.call(
            self._writer, next(self._numbers), "predict", bundle.manifest.key, packed_sequences, wait
        )
        return [_unpacked(output) for output in outputs]

    async def decode(
        self, bundle: Bundle, sequences: list[NDArray[np.generic]], decoding: Decoding, *, wait: bool
    ) -> list[list[Hypothesis]]:
        await self._until_connected(len(sequences))
        packed_sequences, settings = [_packed(sequence) for sequence in sequences], astuple(decoding)
        found = await self.call(
            self._writer, next(self._numbers), "decode", bundle.manifest.key, packed_sequences, settings, wait
        )
        return [
            [
                Hypothesis(labels, score, is_cut, None if attention is None else _unpacked(attention))
                for labels, score, is_cut, attention in hypotheses
            ]
            for hypotheses in found
        ]

    async def record(self, bundle: Bundle, *, wait: bool) -> Recording:
        await self._until_connected(1)
        recording = _RemoteRecording(self, self._writer, next(self._numbers), self._numbers)
        try:
            await self.call(self._writer, recording.number, "record", bundle.manifest.key, wait)
        except BaseException:
            recording.close()
            raise
        return recording

    async def call(self, writer: asyncio.StreamWriter | None, number: int, what: str, *arguments: Any) -> Any:
        """What the lane's process answers. Raises what it refuses, and LaneLost if this is no longer its connection."""
        if writer is None or writer is not self._writer:
            raise lost()
        call = asyncio.get_running_loop().create_future()
        self._calls[number] = call
        try:
            await _send(writer, number, what, *arguments)
            return await call
        except asyncio.CancelledError:
            self.tell(writer, number, "cancel")
            raise
        except OSError:
            raise lost() from None
        finally:
            del self._calls[number]

    def tell(self, writer: asyncio.StreamWriter | None, number: int, what: str) -> None:
        """Without an answer, if this is still the connection."""
        if writer is not None and writer is self._writer:
            _write(writer, number, what)

    async def _until_connected(self, count: int) -> None:
        if self._connected.is_set():
            return
        if self._waiting + count > self._max_waiting:
            raise full(self._waiting, count, self._max_waiting)
        self._waiting += count
        try:
            async with asyncio.timeout(AWAY_S):
                await self._connected.wait()
        except TimeoutError:
            raise lost() from None
        finally:
            self._waiting -= count

    def set_log_level(self, level: str) -> None:
        """The supervisor tells the process itself."""

    async def run(self) -> None:
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                reader, self._writer = await asyncio.open_unix_connection(str(self._address))
                self._connected.set()
                self._set_available(True)
                while True:
                    self._settle(*await _receive(reader))
            self._writer = None
            self._connected.clear()
            self._set_available(False)
            for call in self._calls.values():
                if not call.done():
                    call.set_exception(lost())
            await asyncio.sleep(CONNECT_AGAIN_S)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _set_available(self, available: bool) -> None:
        if available != self.available:
            self.available = available
            self.available_changed.set()

    def _settle(self, number: int, answer: Any, refusal: Any) -> None:
        call = self._calls.get(number)
        if call is None or call.done():
            return
        if refusal is None:
            call.set_result(answer)
        else:
            call.set_exception(unpacked(refusal))


class _RemoteRecording:
    """A Recording of the lane's process, over the connection on which it was begun."""

    def __init__(
        self, lane: RemoteLane, writer: asyncio.StreamWriter | None, number: int, numbers: Iterator[int]
    ) -> None:
        self.number = number
        self._lane = lane
        self._writer = writer
        self._numbers = numbers

    async def store(self, steps: NDArray[np.generic]) -> None:
        await self._call("store", _packed(steps))

    async def compute(self) -> None:
        await self._call("compute")

    async def progress(self) -> Progress:
        return Progress(*await self._call("progress"))

    async def read(self, max_steps: int, *, last_only: bool) -> Piece:
        outputs, more = await self._call("read", max_steps, last_only)
        return Piece(None if outputs is None else _unpacked(outputs), more)

    async def _call(self, what: str, *arguments: Any) -> Any:
        return await self._lane.call(self._writer, next(self._numbers), what, self.number, *arguments)

    def close(self) -> None:
        self._lane.tell(self._writer, self.number, "close")


class LaneServer:
    """Lets every worker use one lane."""

    def __init__(self, lane: Lane, find: Callable[[str, int], Bundle]) -> None:
        """`find` gives the bundle of a name and version, or raises a ServingError."""
        self._lane = lane
        self._find = find

    async def serve(self, address: Path) -> asyncio.Server:
        """Listen there; a socket that a former process left goes."""
        address.unlink(missing_ok=True)  # noqa: ASYNC240 - in a folder of our own
        return await asyncio.start_unix_server(self._connected, str(address))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls: dict[int, asyncio.Task[None]] = {}
        recordings: dict[int, Recording] = {}
        try:
            while True:
                number, what, *arguments = await _receive(reader)
                if what == "cancel":
                    if number in calls:
                        calls[number].cancel()
                elif what == "close":
                    if number in recordings:
                        recordings.pop(number).close()
                else:
                    answer = self._answer(writer, number, partial(self._do, recordings, number, what, *arguments))
                    calls[number] = asyncio.create_task(answer)
                    calls[number].add_done_callback(partial(_forget, calls, number))
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            for call in calls.values():  # the worker is dead, or we end
                call.cancel()
        finally:
            for recording in recordings.values():
                recording.close()
            writer.close()

    async def _do(self, recordings: dict[int, Recording], number: int, what: str, *arguments: Any) -> Any:
        match what, *arguments:
            case "predict", model, sequences, wait:
                inputs = [_unpacked(sequence) for sequence in sequences]
                outputs = await self._lane.predict(self._find(*model), inputs, wait=wait)
                return [_packed(output) for output in outputs]
            case "decode", model, sequences, settings, wait:
                inputs = [_unpacked(sequence) for sequence in sequences]
                found = await self._lane.decode(self._find(*model), inputs, Decoding(*settings), wait=wait)
                return [
                    [(*rest, None if attention is None else _packed(attention)) for *rest, attention in one]
                    for one in found
                ]
            case "record", model, wait:
                recordings[number] = await self._lane.record(self._find(*model), wait=wait)
            case "store", recording, steps:
                await recordings[recording].store(_unpacked(steps))
            case "compute", recording:
                await recordings[recording].compute()
            case "progress", recording:
                return await recordings[recording].progress()
            case "read", recording, max_steps, last_only:
                piece = await recordings[recording].read(max_steps, last_only=last_only)
                return None if piece.outputs is None else _packed(piece.outputs), piece.more
        return None

    async def _answer(
        self, writer: asyncio.StreamWriter, number: int, do: Callable[[], Coroutine[Any, Any, Any]]
    ) -> None:
        with suppress(OSError):
            try:
                answer = await do()
            except ServingError as error:
                await _send(writer, number, None, packed(error))
            except Exception:
                log.exception("a sequence failed")
                await _send(writer, number, None, packed(ExecutionFailed("the sequence could not be computed")))
            else:
                await _send(writer, number, answer, None)


def _forget(calls: dict[int, asyncio.Task[None]], number: int, _: asyncio.Task[None]) -> None:
    calls.pop(number, None)


def _packed(array: NDArray[np.generic]) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()


def _unpacked(value: tuple[str, tuple[int, ...], bytes]) -> Any:
    data_type, shape, data = value
    return np.frombuffer(bytearray(data), np.dtype(data_type)).reshape(shape)  # a copy, for torch wants to own it


def _write(writer: asyncio.StreamWriter, *fields: Any) -> None:
    body: bytes = msgpack.packb(fields)
    writer.write(len(body).to_bytes(LENGTH_BYTES, "little"))
    writer.write(body)


async def _send(writer: asyncio.StreamWriter, *fields: Any) -> None:
    _write(writer, *fields)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> Any:
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
    return msgpack.unpackb(await reader.readexactly(length), use_list=False)
