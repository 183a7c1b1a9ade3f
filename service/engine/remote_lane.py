"""The lane for whole sequences of all workers, seen from one of them and from its own process.

Over a Unix socket, messages of msgpack with their length before them. A call has a number; its answer has the same.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.manifest import ModelKey
from service.engine.executor import Floats
from service.engine.sequence_lane import Lane, full, lost
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
        self._calls: dict[int, asyncio.Future[list[Floats]]] = {}

    async def warm_up(self, folders: list[Path]) -> None:
        """The lane's process does that before the workers need it."""

    async def forget(self, folder: Path) -> None:
        """The lane's process does that when no worker needs it any more."""

    async def predict(self, bundle: Bundle, sequences: list[NDArray[np.generic]], *, wait: bool) -> list[Floats]:
        await self._until_connected(len(sequences))
        if self._writer is None:  # and gone again
            raise lost()
        number, call = next(self._numbers), asyncio.get_running_loop().create_future()
        self._calls[number] = call
        try:
            await _send(self._writer, number, bundle.manifest.key, [_packed(x) for x in sequences], wait)
            result: list[Floats] = await call
            return result
        except asyncio.CancelledError:
            if self._writer is not None:
                with suppress(OSError):
                    await _send(self._writer, number, None, None, False)
            raise
        except OSError:
            raise lost() from None
        finally:
            del self._calls[number]

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

    def _settle(self, number: int, outputs: Any, refusal: Any) -> None:
        call = self._calls.get(number)
        if call is None or call.done():
            return
        if refusal is None:
            call.set_result([_unpacked(output) for output in outputs])
        else:
            call.set_exception(unpacked(refusal))


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
        try:
            while True:
                number, model, sequences, wait = await _receive(reader)
                if model is None:
                    if number in calls:
                        calls[number].cancel()
                    continue
                calls[number] = asyncio.create_task(self._answer(writer, number, ModelKey(*model), sequences, wait))
                calls[number].add_done_callback(partial(_forget, calls, number))
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            for call in calls.values():  # the worker is dead, or we end
                call.cancel()
        finally:
            writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, number: int, model: ModelKey, sequences: list[Any], wait: bool
    ) -> None:
        with suppress(OSError):
            try:
                inputs = [_unpacked(sequence) for sequence in sequences]
                outputs = await self._lane.predict(self._find(*model), inputs, wait=wait)
            except ServingError as error:
                await _send(writer, number, None, packed(error))
            except Exception:
                log.exception("a sequence failed")
                await _send(writer, number, None, packed(ExecutionFailed("the sequence could not be computed")))
            else:
                await _send(writer, number, [_packed(output) for output in outputs], None)


def _forget(calls: dict[int, asyncio.Task[None]], number: int, _: asyncio.Task[None]) -> None:
    calls.pop(number, None)


def _packed(array: NDArray[np.generic]) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()


def _unpacked(value: tuple[str, tuple[int, ...], bytes]) -> Any:
    data_type, shape, data = value
    return np.frombuffer(data, np.dtype(data_type)).reshape(shape)


async def _send(writer: asyncio.StreamWriter, *fields: Any) -> None:
    body: bytes = msgpack.packb(fields)
    writer.write(len(body).to_bytes(LENGTH_BYTES, "little"))
    writer.write(body)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> Any:
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
    return msgpack.unpackb(await reader.readexactly(length), use_list=False)
