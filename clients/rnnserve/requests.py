"""Builds what goes over the wire."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from rnnserve.errors import FieldInvalid
from rnnserve.tensors import Input, sequence_tensor, steps_tensor
from rnnserve.texts import TextUnit, text_steps
from rnnserve.v1 import prediction_pb2, real_time_service_pb2, sequence_service_pb2

StepSelection = Literal["all", "last"]
"""About which steps: each one, or the last one only."""

_MAX_UINT32 = 2**32 - 1
MAX_VERSION = _MAX_UINT32

_SELECTIONS = {
    None: prediction_pb2.STEP_SELECTION_UNSPECIFIED,
    "all": prediction_pb2.STEP_SELECTION_ALL,
    "last": prediction_pb2.STEP_SELECTION_LAST,
}


@dataclass(frozen=True)
class Decoding:
    """How an encoder-decoder searches for its output: beam search, which with a width of 1 is greedy.

    Raises ValueError for a count that the wire has no place for; all other bounds are the server's.
    """

    beam_width: int = 1
    """How many hypotheses are followed at a time; at most 16."""
    n_best: int = 1
    """How many hypotheses a prediction has; at most `beam_width`."""
    length_penalty: float = 0.0
    """A hypothesis' score is its log probability over this power of its length, the end counted: 0 favours short ones,
    1 compares them by the mean over their labels; at most 2."""
    max_labels: int = 0
    """How many labels a hypothesis has at most; 0 = as many as the model may write."""
    attention: bool = False
    """Whether the hypotheses carry their attention; only for models that have it."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "n_best", "max_labels"):
            checked_count(name, getattr(self, name))


def checked_count(name: str, value: int) -> int:
    """The same number. Raises ValueError for one that the wire has no place for."""
    if not 0 <= value <= _MAX_UINT32:
        raise ValueError(f"{name} is a number from 0 to {_MAX_UINT32}, unlike {value}")
    return value


def checked_version(version: int) -> int:
    """The same number. Raises FieldInvalid: the wire has no place for others."""
    if 0 <= version <= MAX_VERSION:
        return version
    message = f"a version is a number from 0 to {MAX_VERSION}, unlike {version}"
    raise FieldInvalid(message, reason="FIELD_INVALID", code="INVALID_ARGUMENT", field="version")


def output_options(
    steps: StepSelection | None,
    probabilities: bool,
    top_k: int,
    threshold: float = 0.0,
    decoding: Decoding | None = None,
) -> prediction_pb2.OutputOptions:
    """`steps` None = as the model's pattern has it; `decoding` None = it is not set."""
    if steps not in _SELECTIONS:
        raise ValueError(f'steps must be "all" or "last", not {steps!r}')
    return prediction_pb2.OutputOptions(
        steps=_SELECTIONS[steps],
        probabilities=probabilities,
        top_k=top_k,
        threshold=threshold,
        decoding=None if decoding is None else prediction_pb2.Decoding(**asdict(decoding)),
    )


def steps_message(first_step: int, x: Input, unit: TextUnit | None = None) -> tuple[real_time_service_pb2.Steps, int]:
    """One step or several in a row, and how many they are."""
    if isinstance(x, str):
        return real_time_service_pb2.Steps(first_step=first_step, text=x), len(text_steps(x, unit))
    tensor = steps_tensor(x)
    return real_time_service_pb2.Steps(first_step=first_step, tensor=tensor), tensor.shape[0]


def sequence_message(x: Input) -> sequence_service_pb2.Sequence:
    """One whole sequence."""
    if isinstance(x, str):
        return sequence_service_pb2.Sequence(text=x)
    return sequence_service_pb2.Sequence(tensor=sequence_tensor(x))


def predict_request(
    model: str, version: int, inputs: Iterable[Input], options: prediction_pb2.OutputOptions
) -> sequence_service_pb2.PredictRequest:
    """A few whole sequences."""
    if isinstance(inputs, str):
        raise TypeError("inputs is a list of sequences; for one text write [text]")
    return sequence_service_pb2.PredictRequest(
        model=model, version=checked_version(version), sequences=map(sequence_message, inputs), options=options
    )
