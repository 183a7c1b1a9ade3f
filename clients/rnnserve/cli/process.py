"""The command as a process of its own."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from rnnserve.cli.app import app


def main() -> None:
    """The entry point."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    with _without_transport_log():
        app(prog_name="rnnserve")


def _end(signal_number: int, _: object) -> None:
    """As an error would, so that what the command has begun on the server is ended, too."""
    raise SystemExit(128 + signal_number)


@contextmanager
def _without_transport_log() -> Iterator[None]:
    """What grpc's core logs is dropped unless the user asks for it, since our own complaints tell it in a sentence.

    GRPC_VERBOSITY would be too late: it is read when grpc is imported. But the core always writes to descriptor 2, and
    Python need not.
    """
    if "GRPC_VERBOSITY" in os.environ or sys.stderr is None:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors) as ours,
        redirect_stderr(ours),
    ):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(ours.fileno(), 2)
