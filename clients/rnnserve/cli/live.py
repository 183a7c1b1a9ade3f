"""A live picture of a stream in the terminal: a bar for each label, and its recent course."""

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rnnserve.cli.show import NO_LABEL
from rnnserve.models import Model
from rnnserve.results import Answer
from rnnserve.tensors import Array, Input

_COURSE_WIDTH = 40
_BAR_WIDTH = 24
_LEVELS = " ▁▂▃▄▅▆▇█"


class StreamView:
    """Draws the newest answer whenever the terminal is refreshed."""

    def __init__(self, model: Model, title: str) -> None:
        self._title = title
        self._names = model.labels or tuple(f"output {i}" for i in range(model.outputs))
        self._rate_hz = model.steps_per_second
        self._answer: Answer | None = None
        self._read = ""
        self._course: deque[Array] = deque(maxlen=_COURSE_WIDTH)

    @contextmanager
    def on(self, console: Console) -> Iterator[None]:
        """Draws while the block runs; where there is no terminal, once at its end."""
        if console.is_terminal:
            with Live(self, console=console, refresh_per_second=12, redirect_stderr=sys.stderr.isatty()):
                yield
        else:
            yield
            console.print(self)

    def show(self, answer: Answer, step: Input) -> None:
        """The newest answer, and the step that it is about."""
        self._answer = answer
        self._read = f" · {step}" if isinstance(step, str) else ""
        self._course.append(answer.output if answer.probabilities is None else answer.probabilities)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Group(Text(self._title, style="bold"), self._heading(), self._bars())

    def _heading(self) -> Text:
        if self._answer is None:
            return Text("waiting for the first step")
        seconds = f" · {(self._answer.step + 1) / self._rate_hz:5.1f} s" if self._rate_hz else ""
        label = "" if self._answer.probabilities is None else f" · {self._answer.label or NO_LABEL}"
        return Text(f"step {self._answer.step}{seconds}{self._read}{label}")

    def _bars(self) -> Table:
        table = Table.grid(padding=(0, 1))
        if not self._course:
            return table
        course = np.stack(self._course)
        low, high = _scale(course, is_probability=self._answer is not None and self._answer.probabilities is not None)
        for column, name in enumerate(self._names):
            values = course[:, column]
            now = float(values[-1])
            is_best = now == course[-1].max()
            bar = ProgressBar(total=high - low, completed=now - low, width=_BAR_WIDTH)
            table.add_row(Text(name, style="bold" if is_best else ""), bar, f"{now:6.2f}", sparkline(values, low, high))
        return table


def sparkline(values: Array, low: float, high: float) -> str:
    """(steps,) -> one character a step, from blank at `low` to full at `high`."""
    shares = np.clip((values - low) / (high - low), 0.0, 1.0)
    return "".join(_LEVELS[round(float(share) * (len(_LEVELS) - 1))] for share in shares)


def _scale(course: Array, *, is_probability: bool) -> tuple[float, float]:
    if is_probability:
        return 0.0, 1.0
    low, high = float(course.min()), float(course.max())
    return low, max(high, low + 1e-6)
