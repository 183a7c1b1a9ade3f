"""Sequences on their way to the server: in one message where they fit, else cut into parts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rnnserve.errors import RnnserveError
from rnnserve.requests import sequence_message
from rnnserve.tensors import array_from, sequence_array, sequence_tensor
from rnnserve.v1.sequence_service_pb2 import IdentifiedSequence, PredictStreamRequest, Sequence, SequencePart

Values = npt.NDArray[np.generic] | str
"""(steps, features), also of a file that is read as it is sent, or a text."""

PART_BYTES = 2**20
_OVERHEAD_BYTES = 256  # of all but the steps
_CHARACTER_BYTES = 4  # at most


@dataclass(frozen=True)
class Fit:
    """What a server takes in one message; the defaults are those of a server."""

    message_bytes: int = 4 * 2**20
    steps: int = 20_000

    def whole(self, values: Values) -> bool:
        """Whether that fits into one message."""
        return len(values) <= self.most_steps(values, self.message_bytes)

    def most_steps(self, values: Values, size_bytes: int) -> int:
        """So many of its steps fit into so many bytes."""
        step_bytes = _CHARACTER_BYTES if isinstance(values, str) else 4 * values.shape[1]
        return max(1, min(self.steps, (size_bytes - _OVERHEAD_BYTES) // max(1, step_bytes)))

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
    return PredictStreamRequest(sequence=IdentifiedSequence(id=number, sequence=sequence_message(values)))


def part_requests(number: int, values: Values, fit: Fit) -> Iterator[PredictStreamRequest]:
    """A sequence in parts, each read when it is asked for."""
    steps = fit.most_steps(values, min(PART_BYTES, fit.message_bytes))
    for first_step in range(0, len(values), steps):
        part = values[first_step : first_step + steps]
        sequence = Sequence(text=part) if isinstance(part, str) else Sequence(tensor=sequence_tensor(part, first_step))
        last = first_step + steps >= len(values)
        yield PredictStreamRequest(part=SequencePart(id=number, first_step=first_step, sequence=sequence, last=last))


def dropped_request(number: int) -> PredictStreamRequest:
    """Has the server refuse what it has of a sequence: a last part without steps."""
    return PredictStreamRequest(part=SequencePart(id=number, last=True))


def values_of(request: PredictStreamRequest) -> Values:
    """What is in a request with a whole sequence."""
    sequence = request.sequence.sequence
    return sequence.text if sequence.WhichOneof("input") == "text" else array_from(sequence.tensor)


def checked_values(x: npt.ArrayLike) -> Values:
    """What was given, as something that can be cut. Raises ShapeMismatch, DataTypeMismatch."""
    return x if isinstance(x, str) else sequence_array(x)
