"""Reads what a model is to read: CSV, JSON lines or text, from files or standard input."""

import csv
import io
import itertools
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from rnnserve.cli.outcome import BadInput
from rnnserve.models import Model
from rnnserve.tensors import Array, Input

Row = list[float]

_SHOWN_CHARACTERS = 40
_FLOAT32_END = 2.0**128 - 2.0**103  # from here on float32 rounds to infinity


@dataclass(frozen=True)
class Recording:
    """One whole sequence, and where its steps stand."""

    value: Array | str
    file: str
    lines: Sequence[int]

    @classmethod
    def given(cls, text: str) -> Self:
        """A text that stands in no file."""
        return cls(text, repr(text[:_SHOWN_CHARACTERS]), ())

    def place(self, step: int | None) -> str:
        """The file, and the line where it is known which one."""
        lines = set(self.lines) if step is None else set(self.lines[step : step + 1])
        return place(self.file, lines.pop()) if len(lines) == 1 else self.file


class Places:
    """Where the steps of a file stand, but for the first ones."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._lines: deque[int] = deque()
        self._first_step = 0

    def __bool__(self) -> bool:
        return bool(self._lines)

    def noted(self, steps: Iterable[tuple[int, Input]]) -> Iterator[Input]:
        """The steps alone."""
        for line, step in steps:
            self._lines.append(line)
            yield step

    def drop_until(self, step: int) -> None:
        """Nobody asks for this one any more, or one before it."""
        while self._lines and self._first_step <= step:
            self._lines.popleft()
            self._first_step += 1

    def of(self, step: int) -> str | None:
        """The file and line; None if it has none."""
        number = step - self._first_step
        return place(self._file, self._lines[number]) if 0 <= number < len(self._lines) else None


def place(file: str, line: int) -> str:
    """How a line of a file is named in messages."""
    return f"{file}, line {line}"


def shown(file: str) -> str:
    """How a file is named in messages."""
    return "standard input" if file == "-" else file


@contextmanager
def opened(file: str) -> Iterator[TextIO]:
    """A file, or standard input for "-"."""
    if file == "-":
        yield sys.stdin
        return
    with Path(file).open(encoding="utf-8-sig", newline="") as stream:
        yield stream


def read_steps(lines: Iterable[str], model: Model, file: str) -> Iterator[tuple[int, Input]]:
    """The line and one step at a time, as they come: a character or a word for a text model, (features,) otherwise."""
    with _named(file):
        yield from _text_steps(_characters(lines), model) if model.symbols else _rows(lines, model)


def not_empty(steps: Iterator[tuple[int, Input]], file: str) -> Iterator[tuple[int, Input]]:
    """The same steps, once the first one is there. Raises BadInput if there is none."""
    first = next(steps, None)
    if first is None:
        raise BadInput(f"{file} holds no step")
    return itertools.chain([first], steps)


def read_sequences(file: Path, model: Model) -> list[Recording]:
    """The whole sequences in a file: one for each of its JSON lines if each holds one, else the file is one."""
    with _named(str(file)):
        text = file.read_text(encoding="utf-8-sig")
        recordings = _json_sequences(text, model, file) or [_whole(text, model, file)]
    if not any(len(recording.value) for recording in recordings):
        raise BadInput(f"{file} holds no step")
    return recordings


def _json_sequences(text: str, model: Model, file: Path) -> list[Recording]:
    """Empty if the lines hold no sequences."""
    is_json = file.suffix in (".jsonl", ".ndjson") if model.symbols else _is_json(text)
    values = [(number, _json_value(line, number)) for number, line in _numbered(text.splitlines())] if is_json else []
    if model.symbols:
        return [Recording(_text(value, number), str(file), [number] * (len(value) or 1)) for number, value in values]
    if not all(_is_sequence(value) for _, value in values):
        return []
    return [
        Recording(_array([_numbers(row, model, number) for row in value], model), str(file), [number] * len(value))
        for number, value in values
    ]


def _whole(text: str, model: Model, file: Path) -> Recording:
    """The file as one sequence; the line feed at the end of a text ends its last line, and is no step."""
    if model.symbols:
        text = text.removesuffix("\n")
        steps = list(_text_steps(text, model))
        blank = " " if model.unit == "word" else ""
        return Recording(blank.join(each for _, each in steps), str(file), [number for number, _ in steps])
    rows = list(_rows(text.splitlines(), model))
    return Recording(_array([row for _, row in rows], model), str(file), [number for number, _ in rows])


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Says which file it is that cannot be read."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{file}, {error}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{file} is not UTF-8 text") from None


def at_rate(steps: Iterable[Input], rate_hz: float) -> Iterator[Input]:
    """The same steps, each when its time has come; late ones at once."""
    start_s = time.monotonic()
    for number, step in enumerate(steps):
        time.sleep(max(0.0, start_s + number / rate_hz - time.monotonic()))
        yield step


def write_sample(value: Input, model: Model, folder: Path, name: str) -> Path:
    """Writes a sample so that it can be read again; returns its file."""
    file = folder / (Path(name).name + (".txt" if isinstance(value, str) else ".csv"))
    if isinstance(value, str):
        file.write_text(value, encoding="utf-8")
        return file
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(model.features)
        writer.writerows([str(number) for number in row] for row in np.asarray(value, np.float32))
    return file


def _array(rows: list[Row], model: Model) -> Array:
    return np.array(rows, np.float32).reshape(-1, len(model.features))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list | dict)


def _text(value: Any, line: int) -> str:
    if not isinstance(value, str):
        raise BadInput(f"line {line}: a text is expected, in quotes")
    return value


def _characters(lines: Iterable[str]) -> Iterator[str]:
    """As they come: whoever asks an open file for lines waits for their ends."""
    if isinstance(lines, io.TextIOBase):
        return iter(partial(lines.read, 1), "")
    return itertools.chain.from_iterable(lines)


def _text_steps(characters: Iterable[str], model: Model) -> Iterator[tuple[int, str]]:
    """Each with its line; a word as soon as there is white space behind it."""
    line, word = 1, ""
    for character in characters:
        if model.unit != "word":
            if "\n" in model.symbols or character not in "\r\n":  # the ends of lines, unless the model knows them
                yield line, character
        elif not character.isspace():
            word += character
        elif word:
            yield line, word
            word = ""
        line += character == "\n"
    if word:
        yield line, word


def _rows(lines: Iterable[str], model: Model) -> Iterator[tuple[int, Row]]:
    """Each with its line."""
    header: list[str] | None = None
    for nth, (number, line) in enumerate(_numbered(lines)):
        if _is_json(line):
            yield number, _numbers(_json_value(line, number), model, number)
            continue
        cells = next(csv.reader([line], skipinitialspace=True))
        if nth == 0 and not all(map(_is_number, cells)):
            header = cells
            _check_header(header, model, number)
            continue
        yield number, _numbers(cells if header is None else _by_name(cells, header, model, number), model, number)


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, counted from 1."""
    return ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())


def _check_header(header: Sequence[str], model: Model, line: int) -> None:
    missing = [name for name in model.features if name not in header]
    if missing:
        raise BadInput(
            f"line {line}: the header has no column {missing[0]!r}; {model.name} reads {', '.join(model.features)}"
        )


def _by_name(cells: Sequence[str], header: Sequence[str], model: Model, line: int) -> list[str]:
    """The cells of the features, in their order."""
    if len(cells) != len(header):
        raise BadInput(f"line {line}: {len(cells)} values, but the header has {len(header)}")
    return [cells[header.index(name)] for name in model.features]


def _numbers(cells: Any, model: Model, line: int) -> Row:
    if isinstance(cells, dict):
        if not cells.keys() & set(model.features):
            raise BadInput(f"line {line}: none of these is a feature; {model.name} reads {', '.join(model.features)}")
        cells = [cells.get(name) for name in model.features]
    if not isinstance(cells, list) or len(cells) != len(model.features):
        count = len(cells) if isinstance(cells, list) else 1
        raise BadInput(f"line {line}: {count} values, but {model.name} reads {len(model.features)} a step")
    try:
        numbers = [_number(cell) for cell in cells]
    except (TypeError, ValueError):
        raise BadInput(f"line {line}: not all of these are numbers: {cells}") from None
    for cell, number in zip(cells, numbers, strict=True):
        if abs(number) >= _FLOAT32_END:
            raise BadInput(f"line {line}: {cell!s:.40} does not fit float32, which ends at 3.4e38")
    return numbers


def _number(cell: Any) -> float:
    """A number; NaN for a missing value."""
    try:
        return math.nan if cell in (None, "") else float(cell)
    except OverflowError:  # an integer of JSON, of any length
        return math.inf


def _is_number(cell: str) -> bool:
    try:
        _number(cell.strip())
    except ValueError:
        return False
    return True


def _is_json(text: str) -> bool:
    return text.lstrip().startswith(("[", "{"))


def _json_value(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"line {number}: no JSON: {error}") from None
