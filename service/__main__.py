"""`python -m service`: serve until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from service.settings import Settings

try:
    from uvloop import new_event_loop
except ImportError:  # not on Windows
    from asyncio import new_event_loop  # type: ignore[assignment]


Errors: TypeAlias = tuple[type[Exception], ...]


def _of_processes(settings: Settings) -> tuple[Callable[[Settings], Coroutine[Any, Any, None]], Errors]:
    """What runs here, and why it may not start. Imported late, so that neither --help nor a supervisor needs torch."""
    from service.addresses import StartError

    if settings.workers > 1:
        from service.supervisor import supervise

        return supervise, (StartError,)
    from service.app import serve
    from service.catalog.catalog import CatalogError

    return serve, (StartError, CatalogError)


def main() -> int:
    """Exit code 0 once a signal has ended it, 2 if the service could not start."""
    for number in (signal.SIGINT, signal.SIGTERM):  # until what runs here hears of them: imports take seconds
        signal.signal(number, lambda *_: os._exit(0))  # nothing has begun yet
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # until there is a log of which to change the level
    from service import logs
    from service.logs import LogSettings
    from service.settings import SettingsError, read_settings

    try:
        settings = read_settings()
        logs.configure(LogSettings(settings.log_level, settings.log_format))
        run, errors = _of_processes(settings)
    except SettingsError as error:
        print(f"rnnserve: {error}", file=sys.stderr)
        return 2
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(run(settings))
    except errors as error:
        print(f"rnnserve: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if exit_code := main():
        sys.exit(exit_code)
    logging.shutdown()
    os._exit(0)  # all is closed, and to unload torch takes a second that a drain does not have
