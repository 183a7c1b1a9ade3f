"""`python -m service`: serve until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from service.settings import SettingsError, read_settings

try:
    from uvloop import new_event_loop
except ImportError:  # not on Windows
    from asyncio import new_event_loop  # type: ignore[assignment]


def main() -> int:
    """Exit code 0 after a drain, 2 if the service could not start."""
    try:
        settings = read_settings()
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        from service.app import StartError, serve  # after the settings, so that --help needs no torch
        from service.catalog.catalog import CatalogError
    except SettingsError as error:
        print(f"rnnserve: {error}", file=sys.stderr)
        return 2
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(serve(settings))
    except (StartError, CatalogError) as error:
        print(f"rnnserve: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if exit_code := main():
        sys.exit(exit_code)
    logging.shutdown()
    os._exit(0)  # all is closed, and to unload torch takes a second that a drain does not have
