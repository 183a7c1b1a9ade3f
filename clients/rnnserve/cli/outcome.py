"""How a command ends: one line that a person can act on, and an exit code that a script can."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from rnnserve import errors

REFUSED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130

_ADVICE: dict[type[errors.RnnserveError], str] = {
    errors.ModelNotFound: "`rnnserve models` lists what is served",
    errors.ModelNotStreamable: "`rnnserve predict` sends whole sequences",
    errors.UnknownSymbol: "`rnnserve models NAME` lists the characters that it knows",
    errors.ShapeMismatch: "`rnnserve models NAME` lists the features of a step",
}

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
    except UnicodeDecodeError:
        _complain("the input is not UTF-8 text")
        raise typer.Exit(USAGE) from None
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


def describe(error: errors.RnnserveError) -> str:
    """The reason and what to do, in one line."""
    place = "" if error.index is None else f"sequence {error.index}: "
    again = "" if error.retry_after_s is None else f"try again in {error.retry_after_s:g} s"
    parts = [f"{error.reason or error.code}: {place}{error.message}", _ADVICE.get(type(error), ""), again]
    return "; ".join(filter(None, parts)).replace("\n", " ")


def _complain(message: str) -> None:
    stderr.print(Text.assemble(("rnnserve: ", "bold red"), message), soft_wrap=True)
