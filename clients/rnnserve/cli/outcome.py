"""How a command ends: one line that a person can act on, and an exit code that a script can."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from rnnserve import errors

REFUSED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130

_ADVICE: dict[type[errors.RnnserveError], str] = {
    errors.ModelNotFound: "`rnnserve models` lists what is served",
    errors.ModelInUse: "`rnnserve unload NAME --end-streams` ends them",
    errors.ModelNotStreamable: "`rnnserve predict` sends whole sequences",
    errors.ModelNotGenerative: "`rnnserve models` lists what each model does",
    errors.UnknownSymbol: "`rnnserve models NAME` tells what it knows",
    errors.ShapeMismatch: "`rnnserve models NAME` lists the features of a step",
}

_IN_MESSAGE = re.compile(
    r"^step \d+ of the (?:message|sequence) has | at (?:character|word) \d+"
)  # of no use to whoever counts lines

stdout = Console(highlight=False, markup=False)
stderr = Console(stderr=True, highlight=False, markup=False)


class BadInput(Exception):
    """A file or an option that makes no sense; the message says where and why."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Ends the command for what the user or the server did, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    except BadInput as error:
        _complain(str(error))
        raise typer.Exit(USAGE) from None
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        raise typer.Exit(USAGE) from None
    except (errors.Unreachable, errors.TimedOut) as error:
        _complain(error.message)
        raise typer.Exit(UNREACHABLE) from None
    except errors.RnnserveError as error:
        _complain(describe(error))
        raise typer.Exit(REFUSED) from None


@contextmanager
def placed(place: Callable[[errors.RnnserveError], str | None]) -> Iterator[None]:
    """Adds to a refusal of a step where that step stands, if that is known."""
    try:
        yield
    except (errors.InvalidArgument, errors.ExecutionFailed) as error:
        where = place(error)
        if where is not None:
            error.add_note(where)
        raise


def describe(error: errors.RnnserveError) -> str:
    """The reason and what to do, in one line."""
    places = getattr(error, "__notes__", [])
    message = ": ".join([*places, _IN_MESSAGE.sub("", error.message) if places else error.message])
    again = "" if error.retry_after_s is None else f"try again in {error.retry_after_s:g} s"
    parts = [f"{error.reason or error.code}: {message}", _ADVICE.get(type(error), ""), again]
    return "; ".join(filter(None, parts)).replace("\n", " ")


def tell(line: str) -> None:
    """On standard error; where a picture is drawn on the terminal, above it, which rich sees to."""
    print(line, file=sys.stderr, flush=True)


def _complain(message: str) -> None:
    stderr.print(Text.assemble(("rnnserve: ", "bold red"), message), soft_wrap=True)
