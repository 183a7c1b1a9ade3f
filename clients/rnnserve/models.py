"""What the server says about the models that it serves."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rnnserve.tensors import Array, array_from
from rnnserve.texts import TextUnit, unit_from
from rnnserve.v1 import model_service_pb2 as pb


@dataclass(frozen=True)
class Quality:
    """A metric on data that training never saw."""

    metric: str
    value: float
    split: str
    items: int
    """How many predictions were scored."""
    interval_95: tuple[float, float] | None = None
    """What other held-out data of the kind might give, 95 times in a hundred."""


@dataclass(frozen=True)
class TrainingData:
    """The source of the training data."""

    name: str
    licence: str
    credit: str


@dataclass(frozen=True)
class Model:
    """A trained network that the server serves."""

    name: str
    version: int
    summary: str
    pattern: str
    """Such as "many-to-one" or "many-to-many-aligned"."""
    cell: str
    """One of "tanh", "relu", "gru", "lstm"."""
    layers: int
    transition_layers: int
    """Cells in a row within one step of a layer: more than 1 in a deep transition."""
    hidden_size: int
    direction: str
    """One of "forward", "bidirectional"."""
    streamable: bool
    why_not_streamable: str
    """Empty for a streamable model."""
    features: tuple[str, ...]
    """The names of the features of a step, in order; empty for a text model."""
    symbols: tuple[str, ...]
    """The characters or words that a text model knows; empty for a numeric model. `Client.models` gives at most 256 of
    them, `Client.model` all."""
    outputs: int
    """Width of the output of a step."""
    labels: tuple[str, ...]
    """The label of each output; empty for a model that is no classifier."""
    missing_values: str
    """What NaN means: "refuse", "hold-last" or "mean"; empty for a text model."""
    steps_per_second: float
    """Of the recordings that it was trained on; 0 = no fixed rate."""
    parameters: int
    quality: Quality | None
    training_data: TrainingData | None
    weights_sha256: str
    max_labels: int = 0
    """Of an output of an encoder-decoder; 0 for other models."""
    attention: bool = False
    """Whether a label of such an output attends to the steps of the input."""
    unit: TextUnit | None = None
    """What a step of a text is: a "character", or a "word", which is what `text.split()` gives; None for numbers."""
    unknown: str | None = None
    """Which symbol stands for each step that is none of them; None = such a step is refused."""
    fold_case: bool = False
    """Whether a step that is no symbol is looked up in lower case, too, and a word without punctuation around it."""
    symbol_count: int = 0
    """How many symbols there are."""
    look_ahead: int = 0
    """How many steps beyond the one that it answers about it reads: a stream answers about a step so much later."""
    rewrites: Mapping[str, str] = field(default_factory=dict)
    """What a character of a text becomes where the label about it is any but the first; see `rewritten`."""

    max_symbols: int = 0
    """Of an output of a one-to-many model; 0 for other models."""
    start_symbol: str = ""
    """What such a model reads first."""
    end_symbol: str | None = None
    """What means the end of such an output; None = it has no end of its own."""

    @property
    def encoder_decoder(self) -> bool:
        """Whether it writes a sequence of another length, so that its predictions are hypotheses."""
        return self.pattern == "many-to-many-unaligned"

    def rewritten(self, text: str, labels: Iterable[str | None]) -> str:
        """The text that the labels about its characters mean. A label that is left out (None) changes nothing.

        Raises ValueError if there are not as many labels as characters.
        """
        unchanged = (None, *self.labels[:1])
        return "".join(
            each if label in unchanged else self.rewrites.get(each, each)
            for each, label in zip(text, labels, strict=True)
        )

    def __str__(self) -> str:
        kind = f"{self.pattern}, {self.cell}, {self.layers} layer{'s' * (self.layers != 1)}, {self.direction}"
        return f"{self.name} v{self.version}: {kind}, {'streamable' if self.streamable else 'whole sequences only'}"


@dataclass(frozen=True, eq=False)
class Sample:
    """A held-out recording that ships with a model, to try it on."""

    name: str
    label: str | None
    """What it truly is; None if it has no label."""
    description: str
    input: Array | str
    """As the model reads it: (steps, features) float32, or a text."""


def model_from(message: pb.Model) -> Model:
    """A message of the wire -> what the caller gets."""
    return Model(
        name=message.name,
        version=message.version,
        summary=message.summary,
        pattern=_plain(pb.Pattern.Name, message.pattern, "PATTERN_"),
        cell=_plain(pb.Cell.Name, message.cell, "CELL_"),
        layers=message.layers,
        transition_layers=message.transition_layers,
        hidden_size=message.hidden_size,
        direction=_plain(pb.Direction.Name, message.direction, "DIRECTION_"),
        streamable=message.streamable,
        why_not_streamable=message.why_not_streamable,
        features=tuple(message.features),
        symbols=tuple(message.symbols),
        outputs=message.outputs,
        labels=tuple(message.labels),
        missing_values=_plain(pb.MissingValues.Name, message.missing_values, "MISSING_VALUES_"),
        steps_per_second=message.steps_per_second,
        parameters=message.parameters,
        quality=_quality_from(message.quality) if message.HasField("quality") else None,
        training_data=_training_data_from(message.training_data) if message.HasField("training_data") else None,
        weights_sha256=message.weights_sha256,
        max_labels=message.decoder.max_labels,
        attention=message.decoder.attention,
        unit=unit_from(message.text_unit),
        unknown=message.unknown_symbol if message.HasField("unknown_symbol") else None,
        fold_case=message.fold_case,
        symbol_count=message.symbol_count,
        max_symbols=message.generation.max_symbols,
        start_symbol=message.generation.start,
        end_symbol=message.generation.end if message.generation.HasField("end") else None,
        look_ahead=message.look_ahead,
        rewrites=dict(message.rewrites),
    )


def samples_from(messages: Iterable[pb.Sample]) -> list[Sample]:
    """Messages of the wire -> what the caller gets."""
    return [
        Sample(
            name=message.name,
            label=message.label or None,
            description=message.description,
            input=message.text if message.HasField("text") else array_from(message.tensor),
        )
        for message in messages
    ]


def _quality_from(message: pb.Quality) -> Quality:
    interval = (message.interval_95.low, message.interval_95.high) if message.HasField("interval_95") else None
    return Quality(message.metric, message.value, message.split, message.items, interval)


def _training_data_from(message: pb.TrainingData) -> TrainingData:
    return TrainingData(message.name, message.licence, message.credit)


def _plain(name_of: Callable[[Any], str], value: int, prefix: str) -> str:
    """CELL_LSTM -> "lstm"; a value that this version does not know -> its number; unspecified -> ""."""
    try:
        name = name_of(value).removeprefix(prefix).lower().replace("_", "-")
    except ValueError:
        return str(value)
    return "" if name == "unspecified" else name
