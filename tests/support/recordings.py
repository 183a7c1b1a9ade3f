"""What is kept of sequences in parts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def resident_bytes(folder: Path) -> int:
    """Of the maps of such files, what is in the memory of this process. Linux only."""
    found, ours = 0, False
    for name, *rest in (line.split() for line in Path("/proc/self/smaps").read_text().splitlines()):
        if not name.endswith(":"):  # the next map begins
            ours = bool(rest) and rest[-2].startswith(f"{folder}/")
        elif ours and name == "Rss:":
            found += int(rest[0]) * 1024
    return found


def spilled_bytes(folder: Path, pid: int | str = "self") -> int:
    """Of the files without a name that a process has in a folder: a map has its file open, too. Linux only."""
    found: dict[int, int] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed in between
            if os.readlink(link).startswith(f"{folder}/"):
                status = link.stat()
                found[status.st_ino] = status.st_size
    return sum(found.values())
