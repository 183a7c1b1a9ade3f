"""What a bundle says of itself: the schema of `manifest.json`."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from models.recurrent import NetworkSpec

Pattern = Literal["one-to-one", "one-to-many", "many-to-one", "many-to-many aligned", "many-to-many unaligned"]
MissingValues = Literal["refuse", "hold_last", "mean"]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Symbol = Annotated[str, StringConstraints(min_length=1, max_length=1)]
Text = Annotated[str, StringConstraints(min_length=1)]


class ModelKey(NamedTuple):
    """What tells one bundle from another."""

    name: str
    version: int


class UnknownSymbolError(ValueError):
    """A text has a character that the model does not know."""

    def __init__(self, symbol: str, place: int) -> None:
        super().__init__(f"{symbol!r} at character {place} is none of the model's symbols")
        self.symbol, self.place = symbol, place


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FeatureInput(_Part):
    """Numeric steps. The network sees (x − mean) / std."""

    kind: Literal["features"] = "features"
    feature_names: tuple[Text, ...] = Field(min_length=1)
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    missing_values: MissingValues = Field(
        "refuse", description="what NaN means: an error, the feature's last value (its mean at first), or its mean"
    )
    steps_per_second: PositiveFloat | None = Field(None, description="the rate of the recordings; none if not fixed")

    @model_validator(mode="after")
    def _one_number_a_feature(self) -> Self:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != len(self.feature_names):
                raise ValueError(f"{name} needs one number for each of the {len(self.feature_names)} feature_names")
        return self


class TextInput(_Part):
    """Text, one character a step; the number of a symbol is its place in `symbols`."""

    kind: Literal["text"] = "text"
    symbols: tuple[Symbol, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _symbols_differ(self) -> Self:
        if len(set(self.symbols)) != len(self.symbols):
            raise ValueError("symbols holds one of them twice")
        return self

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> NDArray[np.int64]:
        """(steps,) numbers of the symbols. Raises UnknownSymbolError."""
        try:
            return np.array([self._numbers[symbol] for symbol in text], dtype=np.int64)
        except KeyError as error:
            symbol = error.args[0]
            raise UnknownSymbolError(symbol, text.index(symbol)) from None


class Output(_Part):
    """What the outputs of the network mean."""

    activation: Literal["softmax", "none"]
    labels: tuple[Text, ...] = Field((), description="one for each output of a classifier; empty otherwise")

    @model_validator(mode="after")
    def _classes_have_labels(self) -> Self:
        if (self.activation == "softmax") != bool(self.labels):
            raise ValueError("labels go with the activation softmax, and softmax with labels")
        return self

    def probabilities(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """(…, outputs) -> (…, outputs), each row summing to 1. Only for classifiers."""
        shifted = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), dtype=np.float32)


class DataSource(_Part):
    """Where the training data came from, and under which licence."""

    name: Text
    archive: Text = Field(description="package, version and file")
    archive_sha256: Sha256
    licence: Text
    credit: Text = Field(description="who made the data")


class Quality(_Part):
    """A metric of these very weights on data that training never saw."""

    metric: Text
    value: float
    split: Text
    items: PositiveInt = Field(description="how many predictions were scored")


class Repeats(_Part):
    """The same training repeated over seeds or folds, each scored on its own held-out data."""

    metric: Text
    over: Text
    values: tuple[float, ...] = Field(min_length=1)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


class Sample(_Part):
    """A held-out recording that ships with the bundle: a CSV file with a header line, or a text file."""

    file: Annotated[str, StringConstraints(pattern=r"^samples/[a-z0-9_-]+\.(csv|txt)$")]
    label: str = Field(description="what it truly is; empty if it has no label")
    description: Text


class Manifest(_Part):
    """Everything about a bundle but its weights."""

    schema_version: Literal[1] = 1
    name: Name
    version: PositiveInt
    summary: Text = Field(description="what it does, in one sentence")
    pattern: Pattern
    network: NetworkSpec
    input: Annotated[FeatureInput | TextInput, Field(discriminator="kind")]
    output: Output
    look_ahead: Literal[0] = Field(0, description="steps that an answer waits for; no other value is served yet")
    data: DataSource
    quality: Quality
    repeats: Repeats | None = None
    samples: tuple[Sample, ...] = ()
    weights_sha256: Sha256

    @property
    def key(self) -> ModelKey:
        return ModelKey(self.name, self.version)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if isinstance(self.input, FeatureInput):
            said, width = "input.feature_names", len(self.input.feature_names)
            wanted, size = "network.features", self.network.features
        else:
            said, width = "input.symbols", len(self.input.symbols)
            wanted, size = "network.symbols", self.network.symbols
        if width != size:
            raise ValueError(f"{said} has {width} entries but {wanted} is {size}")
        if self.output.labels and len(self.output.labels) != self.network.outputs:
            raise ValueError(
                f"output.labels has {len(self.output.labels)} entries but network.outputs is {self.network.outputs}"
            )
        return self
