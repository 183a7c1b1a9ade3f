"""How the service logs: a JSON object a line, or lines for people where a terminal reads them.

A line may name sessions, models and reasons; never an input value, an output or a secret.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import structlog
from structlog.typing import EventDict, Processor

LogFormat: TypeAlias = Literal["auto", "json", "text"]
log = logging.getLogger(__name__)


class LogSettings(NamedTuple):
    """The least level that is logged, and how lines look; `auto` = text on a terminal, else JSON."""

    level: str
    form: LogFormat


_settings = LogSettings("info", "auto")


def configure(settings: LogSettings) -> None:
    """Of this process, from now on."""
    global _settings
    _settings = settings
    is_text = settings.form == "text" or (settings.form == "auto" and sys.stderr.isatty())
    first: list[Processor] = [
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        _add_process,
        structlog.stdlib.ExtraAdder(),
    ]
    plain = structlog.dev.plain_traceback  # others show the local variables, which are inputs and tokens
    last: list[Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False, exception_formatter=plain)]
        if is_text
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    processors = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=first, processors=processors))
    logging.root.handlers = [handler]
    logging.root.setLevel(settings.level.upper())
    logging.getLogger("grpc._cython.cygrpc").addFilter(_above_debug)  # which loop each of its objects is on


def configured() -> LogSettings:
    """For another process: with the level of now."""
    return _settings._replace(level=logging.getLevelName(logging.root.level).lower())


def set_level(level: str) -> None:
    """Until the next change, or the end of the process."""
    logging.root.setLevel(level.upper())


def change_level_on_signals(change: Callable[[str], None]) -> None:
    """SIGUSR1: all there is to be logged. SIGUSR2: as it was set again."""
    for number, level in ((signal.SIGUSR1, "debug"), (signal.SIGUSR2, _settings.level)):
        asyncio.get_running_loop().add_signal_handler(number, change, level)


def _above_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def _add_process(_logger: object, _method: str, event: EventDict) -> EventDict:
    event["pid"] = os.getpid()
    return event
