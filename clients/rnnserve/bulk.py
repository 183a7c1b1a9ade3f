"""The bookkeeping of bulk work, without I/O: answers come in any order and leave in the order of the inputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from rnnserve.errors import RnnserveError
from rnnserve.exchange import CallEnded, Event, InputsEnded, NextInput, Response, Turn
from rnnserve.parts import (
    Fit,
    Values,
    checked_values,
    dropped_request,
    part_requests,
    values_of,
    whole_request,
)
from rnnserve.requests import checked_version
from rnnserve.results import Prediction, joined, prediction_from
from rnnserve.statuses import error_from_status
from rnnserve.tensors import Input
from rnnserve.texts import TextUnit
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.sequence_service_pb2 import OpenPredictStream, PredictStreamRequest, PredictStreamResponse

ErrorHandling = Literal["raise", "return"]
OnProgress = Callable[[int, float], object]
"""Told the index of a sequence in parts, and which share of it is computed, between 0 and 1."""


def open_bulk(model: str, version: int, options: OutputOptions) -> PredictStreamRequest:
    """The first message."""
    return PredictStreamRequest(open=OpenPredictStream(model=model, version=checked_version(version), options=options))


@dataclass(eq=False)
class _Sent:
    """A sequence that has no answer yet."""

    values: Callable[[], Values]
    fit: Fit  # by which it went whole, or was cut
    in_parts: bool
    error: Exception | None = None  # of reading what was to be sent
    parts: list[Prediction] = field(default_factory=list)


class Bulk:
    """Numbers the sequences and puts the answers back into their order.

    What is too long for a message goes in parts. How much fits into one is learnt from what the server refuses.
    A sequence that is refused is raised when its turn comes, or returned in the place of its answer.
    """

    def __init__(self, errors: ErrorHandling, on_progress: OnProgress | None = None) -> None:
        if errors not in ("raise", "return"):
            raise ValueError(f'errors must be "raise" or "return", not {errors!r}')
        self.failure: BaseException | None = None
        self.unit: TextUnit | None = None  # of texts, to be set before the first one
        self._raises = errors == "raise"
        self._taken = 0  # inputs, which is also the next id
        self._given = 0  # results
        self._on_progress = on_progress
        self._fit = Fit()
        self._requests: list[PredictStreamRequest] = []  # of the turn under way
        self._streams: list[Iterator[PredictStreamRequest]] = []
        self._sent: dict[int, _Sent] = {}
        self._ready: dict[int, Prediction | RnnserveError] = {}
        self._ended = False
        self._input_error: BaseException | None = None

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer."""
        return self._taken > self._given

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.failure is not None or (self._ended and not self.waiting)

    def begin(self) -> Turn[PredictStreamRequest, Prediction | RnnserveError]:
        """Nothing: the call has been opened."""
        return Turn()

    def handle(
        self, event: Event[Input, PredictStreamResponse]
    ) -> Turn[PredictStreamRequest, Prediction | RnnserveError]:
        """What to do now."""
        self._requests, self._streams = list[PredictStreamRequest](), list[Iterator[PredictStreamRequest]]()
        match event:
            case NextInput(value):
                self._take(value)
            case Response(message):
                self._hear(message)
            case InputsEnded(error):
                self._ended, self._input_error = True, error
            case CallEnded(call_error):
                self.failure = self.failure or call_error
                return Turn()
        results = list(self._give())
        if self._ended and not self.waiting:
            self.failure = self.failure or self._input_error
        return Turn(self._requests, results, streams=self._streams, places=len(results))

    def _take(self, x: Input) -> None:
        number = self._taken
        self._taken += 1
        try:
            values = checked_values(x, self.unit)
            if self._fit.whole(values):
                request = whole_request(number, values)
                self._sent[number] = _Sent(partial(values_of, request, self.unit), self._fit, in_parts=False)
                self._requests.append(request)
            else:
                self._send_in_parts(number, values)
        except RnnserveError as error:
            self._ready[number] = error

    def _send_in_parts(self, number: int, values: Values) -> None:
        self._sent[number] = sent = _Sent(lambda: values, self._fit, in_parts=True)
        self._streams.append(self._parts(number, values, sent))
        self._tell(number, 0.0)

    def _parts(self, number: int, values: Values, sent: _Sent) -> Iterator[PredictStreamRequest]:
        """Runs where requests are sent, so an error of it waits for what the server answers instead."""
        try:
            for request in part_requests(number, values, sent.fit):
                yield request
                if self._sent.get(number) is not sent:  # it was refused
                    return
        except Exception as error:
            sent.error = error
            yield dropped_request(number)

    def _hear(self, message: PredictStreamResponse) -> None:
        number, sent = message.id, self._sent.get(message.id)
        if sent is None:
            return
        match message.WhichOneof("result"):
            case "progress":
                progress = message.progress
                self._tell(number, progress.computed_steps / max(1, progress.total_steps))
            case "error":
                self._refused(number, sent, error_from_status(message.error))
            case _:
                sent.parts.append(prediction_from(message.prediction))
                if not message.more:
                    if sent.in_parts:
                        self._tell(number, 1.0)
                    self._answered(number, joined(sent.parts))

    def _refused(self, number: int, sent: _Sent, error: RnnserveError) -> None:
        if sent.error is not None and not isinstance(sent.error, RnnserveError):
            self.failure = self.failure or sent.error
            return
        fit = sent.fit.narrowed(error)
        if sent.error is not None or fit == sent.fit:
            self._answered(number, sent.error or error)
            return
        self._fit = Fit(min(fit.message_bytes, self._fit.message_bytes), min(fit.steps, self._fit.steps))
        self._send_in_parts(number, sent.values())

    def _answered(self, number: int, result: Prediction | RnnserveError) -> None:
        del self._sent[number]
        self._ready[number] = result

    def _tell(self, number: int, share: float) -> None:
        if self._on_progress is not None:
            self._on_progress(number, share)

    def _give(self) -> Iterator[Prediction | RnnserveError]:
        """The results whose turn has come."""
        while self.failure is None and self._given in self._ready:
            result = self._ready.pop(self._given)
            if isinstance(result, RnnserveError):
                result.index = self._given
                if self._raises:
                    self.failure = result
                    return
            self._given += 1
            yield result
