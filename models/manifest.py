"""What a bundle says of itself: the schema of `manifest.json`."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from models.generation import Generation
from models.recurrent import NetworkSpec

Pattern = Literal["one-to-one", "one-to-many", "many-to-one", "many-to-many aligned", "many-to-many unaligned"]
MissingValues = Literal["refuse", "hold_last", "mean"]
TextUnit = Literal["character", "word"]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
Text = Annotated[str, StringConstraints(min_length=1)]

LEAST_FLOAT32, MOST_FLOAT32 = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MAX_FOLDED_CHARACTERS = 64  # a text of long ones would take a second
MAX_WIDTH = 2**16  # of a layer, so that the size of any network can be reckoned
MAX_LOOK_AHEAD = 1_000  # steps: a session reads as many behind its last one, one after the other


def _differing(entries: tuple[str, ...]) -> tuple[str, ...]:
    repeated = [entry for entry, times in Counter(entries).items() if times > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} is there more than once")
    return entries


def _without_punctuation(word: str) -> str:
    """Nor signs, at either end."""
    start, end = 0, len(word)
    while start < end and _is_punctuation(word[start]):
        start += 1
    while start < end and _is_punctuation(word[end - 1]):
        end -= 1
    return word[start:end]


def _is_punctuation(character: str) -> bool:
    """What Unicode has in its categories P and S."""
    return unicodedata.category(character)[0] in "PS"


def _in_float32(value: float) -> float:
    if value and not LEAST_FLOAT32 <= abs(value) <= MOST_FLOAT32:
        raise ValueError(f"{value:g} is beyond what float32 can hold")
    return value


def _of_its_unit(value: float, info: ValidationInfo) -> float:
    if info.data.get("metric", "").endswith("percent") and not 0 <= value <= 100:
        raise ValueError(f"{value:g} percent is not between 0 and 100")
    return value


def _of_bounded_width(network: NetworkSpec) -> NetworkSpec:
    for name, value in network:
        sizes = value if isinstance(value, tuple) else (value,)
        if any(isinstance(size, int) and size > MAX_WIDTH for size in sizes):
            raise ValueError(f"{name} is {value}, above the limit of {MAX_WIDTH}")
    return network


def manifest_digest(text: str | bytes) -> str:
    """SHA-256 of what a manifest says beside this digest; the order of its fields and white space do not count."""
    content = {name: value for name, value in json.loads(text).items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ModelKey(NamedTuple):
    """What tells one bundle from another."""

    name: str
    version: int


@cache
def model_key(name: str, version: int) -> ModelKey:
    """The one object for all who keep many: one of each session that a store has parked, say."""
    return ModelKey(name, version)


class UnknownSymbolError(ValueError):
    """A text has a step that the model does not know."""

    def __init__(self, symbol: str, place: int, unit: TextUnit) -> None:
        super().__init__(f"{symbol!r} at {unit} {place} is none of the model's symbols")
        self.symbol, self.place = symbol, place


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FeatureInput(_Part):
    """Numeric steps. The network sees (x − mean) / std."""

    kind: Literal["features"] = "features"
    feature_names: Annotated[tuple[Text, ...], AfterValidator(_differing)] = Field(min_length=1)
    mean: tuple[Annotated[float, AfterValidator(_in_float32)], ...]
    std: tuple[Annotated[PositiveFloat, AfterValidator(_in_float32)], ...]
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

    def behind_the_end(self, steps: int) -> NDArray[np.float32]:
        """(steps, features): the mean, which the network sees as 0 exactly."""
        return np.tile(np.array(self.mean, np.float32), (steps, 1))


class TextInput(_Part):
    """Text, a character or a word a step; the number of a symbol is its place in `symbols`.

    A step is the symbol that it equals. Else, with `fold_case`, the one that its `casefold()` equals, then, if it is a
    word, the one that this equals without the punctuation and signs at its ends; but a word of more than 64 characters
    is not folded. Else it is `unknown`, or refused.
    """

    kind: Literal["text"] = "text"
    unit: TextUnit = Field("character", description="what a step is; words are what white space separates")
    symbols: Annotated[tuple[Text, ...], AfterValidator(_differing)] = Field(min_length=1, description="each a step")
    unknown: str | None = Field(None, description="the symbol that stands for all others; none = they are refused")
    fold_case: bool = Field(
        False, description="whether steps are also looked up in lower case, words also without punctuation"
    )
    padding: str | None = Field(
        None, description="of symbols: what stands behind the end of a text for a look-ahead; a text may have it, too"
    )

    @model_validator(mode="after")
    def _symbols_are_steps(self) -> Self:
        for symbol in self.symbols:
            if list(self.steps(symbol)) != [symbol]:
                raise ValueError(f"symbols has {symbol!r}, which is not one {self.unit}")
        if self.unknown is not None and self.unknown not in self.symbols:
            raise ValueError(f"unknown is {self.unknown!r}, which is none of symbols")
        if self.padding is not None and self.padding not in self.symbols:
            raise ValueError(f"padding is {self.padding!r}, which is none of symbols")
        return self

    def behind_the_end(self, steps: int) -> NDArray[np.int64]:
        """(steps,): the number of the padding. Only with one, or for no steps."""
        return np.full(steps, self.numbers[self.padding] if self.padding is not None else 0)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Of the symbols."""
        return {symbol: number for number, symbol in enumerate(self.symbols)}

    def steps(self, text: str, at_most: int = -1) -> Sequence[str]:
        """The steps of a text. Of words, only the first `at_most` are told apart, and all behind them is one more."""
        return text if self.unit == "character" else text.split(maxsplit=at_most)

    def number_of(self, step: str) -> int | None:
        """The number of the first form of a step that is a symbol, else of `unknown`; None = it is refused."""
        for form in self._forms(step):
            if (number := self.numbers.get(form)) is not None:
                return number
        return self._number_of_unknown

    def numbers_of(self, steps: Sequence[str]) -> NDArray[np.int64]:
        """(steps,) numbers of their symbols. Raises UnknownSymbolError."""
        numbers = list[int]()
        for place, step in enumerate(steps):
            number = self.numbers.get(step)  # most are symbols as they are
            if number is None and (number := self.number_of(step)) is None:
                raise UnknownSymbolError(step, place, self.unit)
            numbers.append(number)
        return np.array(numbers, np.int64)

    def encode(self, text: str) -> NDArray[np.int64]:
        """(steps,) numbers of the symbols of a text, in training as in serving. Raises UnknownSymbolError."""
        return self.numbers_of(self.steps(text))

    def _forms(self, step: str) -> Iterator[str]:
        """In which it is looked up, in this order."""
        yield step
        if self.fold_case and len(step) <= MAX_FOLDED_CHARACTERS:
            yield (folded := step.casefold())
            if self.unit == "word":
                yield _without_punctuation(folded)

    @cached_property
    def _number_of_unknown(self) -> int | None:
        return None if self.unknown is None else self.numbers[self.unknown]


class Output(_Part):
    """What the outputs of the network mean."""

    activation: Literal["softmax", "none"]
    labels: Annotated[tuple[Text, ...], AfterValidator(_differing)] = Field(
        (), description="one for each output of a classifier; empty otherwise"
    )
    rewrites: dict[Text, Text] = Field(
        default_factory=dict,
        description="what a character of the input becomes where the label about it is any but the first",
    )

    @model_validator(mode="after")
    def _classes_have_labels(self) -> Self:
        if (self.activation == "softmax") != bool(self.labels):
            raise ValueError("labels go with the activation softmax, and softmax with labels")
        if self.rewrites and not self.labels:
            raise ValueError("rewrites go with labels")
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

    metric: Text = Field(description="what was measured; a percentage if it ends in 'percent'")
    value: Annotated[float, AfterValidator(_of_its_unit)]
    split: Text
    items: Count = Field(description="how many predictions were scored")
    interval_95: tuple[float, float] | None = Field(
        None, description="low and high end: what other held-out data of the kind might give, 95 times in a hundred"
    )

    @model_validator(mode="after")
    def _within_its_interval(self) -> Self:
        if self.interval_95 and not self.interval_95[0] <= self.value <= self.interval_95[1]:
            raise ValueError("value is not within interval_95")
        return self


class Repeats(_Part):
    """The same training repeated over seeds or folds, each scored on its own held-out data."""

    metric: Text
    over: Text = Field(description="what differs; a number at its start says how many values there are")
    values: tuple[Annotated[float, AfterValidator(_of_its_unit)], ...] = Field(min_length=1)

    @field_validator("values")
    @classmethod
    def _as_many_as_said(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        over = info.data.get("over", "")
        count = re.match(r"\d+", over)
        if count and int(count[0]) != len(values):
            raise ValueError(f"there are {len(values)}, but repeats.over says {over!r}")
        return values

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


class Sample(_Part):
    """A recording that training never saw and that ships with the bundle: a CSV file with a header, or a text file."""

    file: Annotated[str, StringConstraints(pattern=r"^samples/[a-z0-9_-]+\.(csv|txt)$")]
    label: str = Field(description="what it truly is: a label, several in a row, or a number; empty if unknown")
    description: Text


class Manifest(_Part):
    """Everything about a bundle but its weights."""

    schema_version: Literal[1] = 1
    name: Name
    version: Count
    summary: Text = Field(description="what it does, in one sentence")
    pattern: Pattern
    network: Annotated[NetworkSpec, AfterValidator(_of_bounded_width)]
    input: Annotated[FeatureInput | TextInput, Field(discriminator="kind")]
    output: Output
    generation: Generation | None = Field(None, description="how a one-to-many network writes; of no other pattern")
    look_ahead: int = Field(
        0, ge=0, le=MAX_LOOK_AHEAD, description="steps that the network reads beyond the one that it answers about"
    )
    data: DataSource
    quality: Quality
    repeats: Repeats | None = None
    on_samples: Quality | None = Field(None, description="the same metric on the samples that ship with the bundle")
    samples: tuple[Sample, ...] = ()
    weights_sha256: Sha256
    manifest_sha256: Sha256 = Field("0" * 64, description="of all other fields; set when the manifest is written")

    @property
    def key(self) -> ModelKey:
        return ModelKey(self.name, self.version)

    @cached_property
    def padding(self) -> NDArray[np.generic]:
        """(look_ahead, features) or (look_ahead,): read behind a sequence, so that its last steps get their answers."""
        return self.input.behind_the_end(self.look_ahead)

    def _is_unknown(self, label: str) -> bool:
        return bool(label and self.output.labels) and label not in self.output.labels

    def _check_rewrites(self, rewrites: dict[str, str]) -> None:
        if self.pattern != "many-to-many aligned" or not isinstance(self.input, TextInput):
            raise ValueError('output.rewrites goes with a text and the pattern "many-to-many aligned"')
        if self.input.unit != "character" or any(len(each) != 1 for each in rewrites):
            raise ValueError("output.rewrites names single characters of a text that is read character by character")

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
        if (self.network.decoder is None) != (self.pattern != "many-to-many unaligned"):
            raise ValueError('network.decoder goes with the pattern "many-to-many unaligned"')
        if self.network.decoder is not None and len(self.output.labels) < 2:
            raise ValueError("network.decoder needs two output.labels or more, the first of which means the end")
        if (self.generation is None) != (self.pattern != "one-to-many"):
            raise ValueError('generation goes with the pattern "one-to-many"')
        if self.generation is not None:
            symbols = self.input.symbols if isinstance(self.input, TextInput) else ()
            self.generation.check(self.network, symbols, self.output.labels)
        if self.look_ahead and self.generation is not None:
            raise ValueError("look_ahead is not for a network that reads what it writes")
        if self.look_ahead and (reason := self.network.why_not_streamable):
            raise ValueError(f"look_ahead is for networks that stream: {reason}")
        if isinstance(self.input, TextInput) and (self.input.padding is None) == (self.look_ahead > 0):
            raise ValueError("input.padding of a text model goes with look_ahead")
        if self.output.rewrites:
            self._check_rewrites(self.output.rewrites)
        for number, sample in enumerate(self.samples):
            if self.pattern in ("one-to-one", "many-to-one") and self._is_unknown(sample.label):
                raise ValueError(f"samples.{number}.label is {sample.label!r}, which is none of output.labels")
        return self
