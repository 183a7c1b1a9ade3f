"""How far predictions are, drawn on a terminal."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from rich.progress import Progress, TaskID

from rnnserve.cli import outcome
from rnnserve.results import Prediction


class Bars:
    """A bar for each sequence that is sent in parts while it is under way, and one for all where there are several.

    On standard error, and gone at the end; nothing where that is no terminal.
    """

    def __init__(self, files: list[str]) -> None:
        """Of which file each sequence is."""
        self._files = files
        self._progress = Progress(
            console=outcome.stderr,
            transient=True,
            disable=not outcome.stderr.is_terminal,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file or a pipe is not for the screen
        )
        self._bars: dict[int, TaskID] = {}

    @classmethod
    @contextmanager
    def drawn(cls, files: list[str]) -> Iterator[Self]:
        """For the time of the block."""
        bars = cls(files)
        with bars._progress:
            yield bars

    def show(self, index: int, share: float) -> None:
        """Of one in parts."""
        if index not in self._bars:
            self._bars[index] = self._progress.add_task(Path(self._files[index]).name, total=1.0)
        self._progress.update(self._bars[index], completed=share)

    def counted(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same."""
        count = len(self._files)
        everything = self._progress.add_task("predicting", total=count, visible=count > 1)
        for index, prediction in enumerate(predictions):
            self._progress.advance(everything)
            if index in self._bars:
                self._progress.remove_task(self._bars.pop(index))
                self._progress.refresh()  # to print a long result may hold up the next one
            yield prediction
