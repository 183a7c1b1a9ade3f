"""The folder that belongs to one server: locked while it runs, and where it says where it serves."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.addresses import StartError

OWNERS_FILE = "owners.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two servers in one folder would write each other's sessions over. Raises StartError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise StartError(f"state_dir: {folder} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(f"state_dir: {folder} is in use by another server") from None
        yield


@contextmanager
def announced(folder: Path, **where: object) -> Iterator[None]:
    """`server.json` says so, for as long as it is true. Raises StartError."""
    file = folder / "server.json"
    _write(file, where)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def former_owners(folder: Path) -> list[str]:
    """The processes that had sessions when the server of this folder ended: as it is locked by us, they are dead."""
    try:
        return [str(owner) for owner in json.loads((folder / OWNERS_FILE).read_text())]
    except (OSError, ValueError):
        return []


def keep_owners(folder: Path, owners: list[str]) -> None:
    """For the next start. Raises StartError."""
    _write(folder / OWNERS_FILE, owners)


def _write(file: Path, value: object) -> None:
    """Readers see all of it or nothing."""
    draft = file.with_suffix(".draft")
    try:
        draft.write_text(json.dumps(value))
        draft.replace(file)
    except OSError as error:
        raise StartError(f"state_dir: {file} cannot be written: {error.strerror}") from None
