"""Outputs of one-to-many models, symbol by symbol: the bookkeeping, without I/O, and what a caller iterates over."""

import math
import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rnnserve.errors import RnnserveError, TryAgain
from rnnserve.exchange import CallEnded, Event, Response, Turn
from rnnserve.requests import checked_count, checked_version
from rnnserve.results import TopLabel, top_from
from rnnserve.retry import RetryPolicy
from rnnserve.texts import unit_from
from rnnserve.v1 import real_time_service_pb2 as pb

_MAX_SEED = 2**64 - 1
_Turn = Turn[pb.GenerateRequest, "GeneratedSymbol"]


@dataclass(frozen=True)
class GeneratedSymbol:
    """A symbol of an output."""

    step: int
    """Its place in the output, from 0 on."""
    text: str
    log_probability: float
    """The natural logarithm of its probability under the model, before temperature, top_k and top_p."""
    top: tuple[TopLabel, ...]
    """What was most probable under the model, the most probable first; empty unless asked for."""


def generate_request(
    model: str,
    *,
    version: int,
    prompt: str,
    max_symbols: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    stop: Sequence[str],
    alternatives: int,
    deterministic: bool,
) -> pb.GenerateRequest:
    """Raises FieldInvalid, TypeError, ValueError for what the wire has no place for; other bounds are the server's."""
    if isinstance(stop, str):
        raise TypeError("stop is a list of texts; for one text write [text]")
    if seed is not None and not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"seed is a number from 0 to {_MAX_SEED}, unlike {seed}")
    return pb.GenerateRequest(
        model=model,
        version=checked_version(version),
        prompt=prompt,
        max_symbols=checked_count("max_symbols", max_symbols),
        temperature=temperature,
        top_k=checked_count("top_k", top_k),
        top_p=top_p,
        seed=seed,
        stop=stop,
        alternatives=checked_count("alternatives", alternatives),
        deterministic=deterministic,
    )


class Output:
    """What has come of an output. Until something has, the call is tried again where that may help."""

    def __init__(self, retry: RetryPolicy, timeout_s: float) -> None:
        self.failure: BaseException | None = None
        self.started: pb.GenerationStarted | None = None
        self.finished: pb.GenerationFinished | None = None
        self.symbols: list[str] = []
        self._backoffs_s = retry.backoffs_s()
        self._timeout_s = timeout_s
        self._deadline = math.inf  # until it begins

    waiting = True

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.failure is not None or self.finished is not None

    @property
    def text(self) -> str:
        """Of all symbols so far."""
        return self.separator.join(self.symbols)

    @property
    def separator(self) -> str:
        """What stands between two symbols of a text."""
        return " " if self.started is not None and unit_from(self.started.text_unit) == "word" else ""

    @property
    def finish(self) -> str | None:
        """Why it is over, once it is."""
        if self.finished is None:
            return None
        return pb.FinishReason.Name(self.finished.reason).removeprefix("FINISH_REASON_").lower()

    def begin(self) -> _Turn:
        """Nothing: the call has its request."""
        self._deadline = time.monotonic() + self._timeout_s
        return Turn()

    def handle(self, event: Event[None, pb.GenerateResponse]) -> _Turn:
        """What to do now."""
        match event:
            case Response(message):
                return self._hear(message)
            case CallEnded(error):
                return self._ended(error)
        return Turn()

    def _hear(self, message: pb.GenerateResponse) -> _Turn:
        match message.WhichOneof("response"):
            case "started":
                self.started = message.started
            case "symbol":
                symbol = message.symbol
                self.symbols.append(symbol.text)
                top = top_from(symbol.alternatives)
                return Turn(results=[GeneratedSymbol(symbol.index, symbol.text, symbol.log_probability, top)])
            case "finished":
                self.finished = message.finished
        return Turn()

    def _ended(self, error: RnnserveError) -> _Turn:
        backoff_s = next(self._backoffs_s, None) if self.started is None and isinstance(error, TryAgain) else None
        pause_s = None if backoff_s is None else backoff_s + (error.retry_after_s or 0.0)
        if pause_s is None or time.monotonic() + pause_s >= self._deadline:
            self.failure = error
            return Turn()
        return Turn(reconnect_after_s=pause_s)


class _Generation:
    """What is known of an output so far."""

    def __init__(self, output: Output) -> None:
        self._output = output

    @property
    def seed(self) -> int | None:
        """With which the same can be asked for again; None before the first symbol has come."""
        return None if self._output.started is None else self._output.started.seed

    @property
    def version(self) -> int | None:
        """Of the model; None before the first symbol has come."""
        return None if self._output.started is None else self._output.started.version

    @property
    def text(self) -> str:
        """Of all symbols so far, as the model reads texts."""
        return self._output.text

    @property
    def separator(self) -> str:
        """What stands between two symbols of a text: nothing, or a space where they are words."""
        return self._output.separator

    @property
    def finish(self) -> str | None:
        """Why it is over: "end" = the model ended it; "stop" = it ends with one of the stop texts; "max_symbols" = it
        is as long as it may be; None = it is not, or it was broken off."""
        return self._output.finish

    @property
    def stop(self) -> str | None:
        """The stop text that it ends with; None where it ends otherwise."""
        finished = self._output.finished
        return finished.stop if finished is not None and finished.stop else None

    @property
    def end_log_probability(self) -> float | None:
        """Of the symbol that means the end, where the model ended it."""
        finished = self._output.finished
        if finished is None or not finished.HasField("end_log_probability"):
            return None
        return finished.end_log_probability


class Generation(_Generation):
    """An iterator over the symbols of an output. The call begins with the first, and ends with the iterator."""

    def __init__(self, output: Output, symbols: Generator[GeneratedSymbol]) -> None:
        super().__init__(output)
        self._symbols = symbols

    def __iter__(self) -> Iterator[GeneratedSymbol]:
        return self

    def __next__(self) -> GeneratedSymbol:
        return next(self._symbols)

    def close(self) -> None:
        """Ends the call, wherever it is."""
        self._symbols.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncGeneration(_Generation):
    """An async iterator over the symbols of an output. The call begins with the first, and ends with the iterator."""

    def __init__(self, output: Output, symbols: AsyncGenerator[GeneratedSymbol]) -> None:
        super().__init__(output)
        self._symbols = symbols

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> GeneratedSymbol:
        return await anext(self._symbols)

    async def aclose(self) -> None:
        """Ends the call, wherever it is."""
        await self._symbols.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
