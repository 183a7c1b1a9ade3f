"""Reads what a model is to read: CSV, JSON lines or text, from files or standard input."""

import csv
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rnnserve.cli.outcome import BadInput
from rnnserve.models import Model
from rnnserve.tensors import Array, Input

Row = list[float]


@contextmanager
def opened(file: str) -> Iterator[TextIO]:
    """A file, or standard input for "-"."""
    if file == "-":
        yield sys.stdin
        return
    with Path(file).open(encoding="utf-8-sig", newline="") as stream:
        yield stream


def read_steps(lines: Iterable[str], model: Model) -> Iterator[Input]:
    """One step at a time, as the lines come: a character for a text model, (features,) otherwise."""
    if model.symbols:
        for line in lines:
            yield from _known_text(line, model)
    else:
        yield from _rows(lines, model)


def read_sequences(file: Path, model: Model) -> list[Input]:
    """The whole sequences in a file: one for each of its JSON lines if each holds one, else the file is one."""
    text = file.read_text(encoding="utf-8-sig")
    is_json = file.suffix in (".jsonl", ".ndjson") if model.symbols else _is_json(text)
    values = [(number, _json_value(line, number)) for number, line in _numbered(text.splitlines())] if is_json else []
    if model.symbols:
        return [_text(value, number) for number, value in values] if is_json else [_known_text(text, model)]
    if values and all(_is_sequence(value) for _, value in values):
        return [_array([_numbers(row, model, number) for row in value], model) for number, value in values]
    return [_array(list(_rows(text.splitlines(), model)), model)]


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


def _rows(lines: Iterable[str], model: Model) -> Iterator[Row]:
    order: list[int] | None = None
    for place, (number, line) in enumerate(_numbered(lines)):
        if _is_json(line):
            yield _numbers(_json_value(line, number), model, number)
            continue
        cells = next(csv.reader([line], skipinitialspace=True))
        if place == 0 and not all(map(_is_number, cells)):
            order = _columns(cells, model, number)
            continue
        yield _numbers([cells[i] for i in order] if order and len(cells) > max(order) else cells, model, number)


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, counted from 1."""
    return ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())


def _columns(header: Sequence[str], model: Model, line: int) -> list[int]:
    """Where each feature stands."""
    missing = [name for name in model.features if name not in header]
    if missing:
        raise BadInput(
            f"line {line}: the header has no column {missing[0]!r}; {model.name} reads {', '.join(model.features)}"
        )
    return [header.index(name) for name in model.features]


def _numbers(cells: Any, model: Model, line: int) -> Row:
    if isinstance(cells, dict):
        if not cells.keys() & set(model.features):
            raise BadInput(f"line {line}: none of these is a feature; {model.name} reads {', '.join(model.features)}")
        cells = [cells.get(name) for name in model.features]
    if not isinstance(cells, list) or len(cells) != len(model.features):
        count = len(cells) if isinstance(cells, list) else 1
        raise BadInput(f"line {line}: {count} values, but {model.name} reads {len(model.features)} a step")
    try:
        return [_number(cell) for cell in cells]
    except (TypeError, ValueError):
        raise BadInput(f"line {line}: not all of these are numbers: {cells}") from None


def _number(cell: Any) -> float:
    """A number; NaN for a missing value."""
    return math.nan if cell in (None, "") else float(cell)


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


def _known_text(text: str, model: Model) -> str:
    """Without the ends of lines, where the model does not know them."""
    return text if "\n" in model.symbols else text.replace("\r", "").replace("\n", "")
