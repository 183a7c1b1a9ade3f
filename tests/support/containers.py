"""Whether containers can be tried here."""

from __future__ import annotations

import shutil
import subprocess


def compose_works() -> bool:
    """A Docker engine runs, and its compose plugin is there."""
    return shutil.which("docker") is not None and all(
        subprocess.run(["docker", *words], capture_output=True).returncode == 0
        for words in (["compose", "version"], ["info"])
    )
