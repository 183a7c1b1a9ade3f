"""The command `rnnserve`."""

from rnnserve.cli.app import main

__all__ = ["main"]
