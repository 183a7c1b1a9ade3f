"""Imported by Python at its start where this folder is on its path: see `break_processes`."""

import os

from tests.chaos import broken

broken.break_owner(os.environ[broken.VARIABLE])
