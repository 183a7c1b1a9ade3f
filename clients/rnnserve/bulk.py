"""The bookkeeping of bulk work, without I/O: answers come in any order and leave in the order of the inputs."""

from collections.abc import Iterator
from typing import Literal

from rnnserve.errors import RnnserveError
from rnnserve.exchange import CallEnded, Event, InputsEnded, NextInput, Response, Turn
from rnnserve.requests import checked_version, sequence_message
from rnnserve.results import Prediction, prediction_from
from rnnserve.statuses import error_from_status
from rnnserve.tensors import Input
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.sequence_service_pb2 import (
    IdentifiedSequence,
    OpenPredictStream,
    PredictStreamRequest,
    PredictStreamResponse,
)

ErrorHandling = Literal["raise", "return"]


def open_bulk(model: str, version: int, options: OutputOptions) -> PredictStreamRequest:
    """The first message."""
    return PredictStreamRequest(open=OpenPredictStream(model=model, version=checked_version(version), options=options))


class Bulk:
    """Numbers the sequences and puts the answers back into their order.

    A sequence that is refused is raised when its turn comes, or returned in the place of its answer.
    """

    def __init__(self, errors: ErrorHandling) -> None:
        if errors not in ("raise", "return"):
            raise ValueError(f'errors must be "raise" or "return", not {errors!r}')
        self.failure: BaseException | None = None
        self._raises = errors == "raise"
        self._taken = 0  # inputs, which is also the next id
        self._given = 0  # results
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
        requests: list[PredictStreamRequest] = []
        match event:
            case NextInput(value):
                requests = self._take(value)
            case Response(message):
                self._ready[message.id] = _result_from(message)
            case InputsEnded(error):
                self._ended, self._input_error = True, error
            case CallEnded(call_error):
                self.failure = self.failure or call_error
                return Turn()
        results = list(self._give())
        if self._ended and not self.waiting:
            self.failure = self.failure or self._input_error
        return Turn(requests, results, places=len(results))

    def _take(self, x: Input) -> list[PredictStreamRequest]:
        number = self._taken
        self._taken += 1
        try:
            sequence = IdentifiedSequence(id=number, sequence=sequence_message(x))
        except RnnserveError as error:
            self._ready[number] = error
            return []
        return [PredictStreamRequest(sequence=sequence)]

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


def _result_from(message: PredictStreamResponse) -> Prediction | RnnserveError:
    if message.HasField("error"):
        return error_from_status(message.error)
    return prediction_from(message.prediction)
