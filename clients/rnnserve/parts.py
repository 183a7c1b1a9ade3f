"""Sequences on their way to the server: in one message where they fit, else cut into parts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rnnserve.errors import RnnserveError
from rnnserve.requests import sequence_message
from rnnserve.tensors import array_from, sequence_array, sequence_tensor
from rnnserve.texts import CHARACTER_BYTES, TextSteps, TextUnit, text_of, text_steps
from rnnserve.v1.sequence_service_pb2 import IdentifiedSequence, PredictStreamRequest, Sequence, SequencePart

Values = npt.NDArray[np.generic] | TextSteps
"""(steps, features), also of a file that is read as it is sent, or the steps of a text."""

PART_BYTES = 2**20
_OVERHEAD_BYTES = 256  # of all but the steps


@dataclass(frozen=True)
class Fit:
    """What a server takes in one message; the defaults are those of a server."""

    message_bytes: int = 4 * 2**20
    steps: int = 20_000

    def whole(self, values: Values) -> bool:
        """Whether that fits into one message."""
        return len(values) <= self.most_steps(values, self.message_bytes)

    def most_steps(self, values: Values, size_bytes: int, first_step: int = 0) -> int:
        """So many of its steps from that one on fit into so many bytes."""
        room_bytes = size_bytes - _OVERHEAD_BYTES
        if isinstance(values, list):
            return max(1, _words_within(values[first_step : first_step + self.steps], room_bytes))
        step_bytes = CHARACTER_BYTES if isinstance(values, str) else 4 * values.shape[1]
        return max(1, min(self.steps, room_bytes // max(1, step_bytes)))

    def narrowed(self, error: RnnserveError) -> "Fit":
        """What fits in the light of a refusal; the same where that is about something else, or says nothing new."""
        limit = int(error.metadata.get("limit", 0))
        if error.reason == "MESSAGE_TOO_LARGE" and error.field in (None, "request") and 0 < limit < self.message_bytes:
            return Fit(limit, self.steps)
        if error.reason == "TOO_MANY_STEPS" and 0 < limit < self.steps:
            return Fit(self.message_bytes, limit)
        return self


def whole_request(number: int, values: Values) -> PredictStreamRequest:
    """A sequence in one message."""
    whole = text_of(values) if isinstance(values, list) else values
    return PredictStreamRequest(sequence=IdentifiedSequence(id=number, sequence=sequence_message(whole)))


def part_requests(number: int, values: Values, fit: Fit) -> Iterator[PredictStreamRequest]:
    """A sequence in parts, each read when it is asked for."""
    first_step = 0
    while first_step < len(values):
        end = first_step + fit.most_steps(values, min(PART_BYTES, fit.message_bytes), first_step)
        sequence, last = _sequence(values[first_step:end], first_step), end >= len(values)
        yield PredictStreamRequest(part=SequencePart(id=number, first_step=first_step, sequence=sequence, last=last))
        first_step = end


def dropped_request(number: int) -> PredictStreamRequest:
    """Has the server refuse what it has of a sequence: a last part without steps."""
    return PredictStreamRequest(part=SequencePart(id=number, last=True))


def values_of(request: PredictStreamRequest, unit: TextUnit | None) -> Values:
    """What is in a request with a whole sequence."""
    sequence = request.sequence.sequence
    is_text = sequence.WhichOneof("input") == "text"
    return text_steps(sequence.text, unit) if is_text else array_from(sequence.tensor)


def checked_values(x: npt.ArrayLike, unit: TextUnit | None) -> Values:
    """What was given, as something that can be cut. Raises ShapeMismatch, DataTypeMismatch."""
    return text_steps(x, unit) if isinstance(x, str) else sequence_array(x)


def _sequence(values: Values, first_step: int) -> Sequence:
    """Some steps of a sequence, from that one on."""
    if isinstance(values, np.ndarray):
        return Sequence(tensor=sequence_tensor(values, first_step))
    return Sequence(text=text_of(values))


def _words_within(words: list[str], room_bytes: int) -> int:
    """So many of these, with a blank behind each, fit."""
    ends = np.cumsum([len(word.encode()) + 1 for word in words])
    return int(np.searchsorted(ends, room_bytes, side="right"))
