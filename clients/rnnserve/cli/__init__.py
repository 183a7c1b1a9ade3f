"""The command `rnnserve`."""

from rnnserve.cli.process import main

__all__ = ["main"]
