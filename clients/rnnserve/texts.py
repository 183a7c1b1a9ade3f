"""Texts as models read them: a character or a word a step."""

from collections.abc import Iterable
from typing import Literal, TypeAlias

from rnnserve.v1 import tensor_pb2

TextUnit = Literal["character", "word"]
"""What a step of a text is; words are what white space separates."""

TextSteps: TypeAlias = str | list[str]
"""The steps of a text, which can be counted and cut: its characters, or its words."""

CHARACTER_BYTES = 4  # at most

_UNITS: dict[int, TextUnit] = {tensor_pb2.TEXT_UNIT_CHARACTER: "character", tensor_pb2.TEXT_UNIT_WORD: "word"}


def unit_from(value: int) -> TextUnit | None:
    """What the wire says -> None if the model reads no text."""
    return _UNITS.get(value)


def text_steps(text: str, unit: TextUnit | None) -> TextSteps:
    """The steps of a text; a unit that is not known counts as characters."""
    return text.split() if unit == "word" else text


def text_of(steps: TextSteps) -> str:
    """A text that has these steps."""
    return steps if isinstance(steps, str) else " ".join(steps)


def size_bytes(texts: Iterable[str]) -> int:
    """How many bytes these have in a message, at most."""
    return CHARACTER_BYTES * sum(map(len, texts))
