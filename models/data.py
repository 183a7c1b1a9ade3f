"""Training data out of package archives: fetched by name, version and digest, read without installing them."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class DataError(RuntimeError):
    """An archive that could not be fetched, is not the one meant, or lacks a file."""


@dataclass(frozen=True)
class Archive:
    """A wheel of the Python Package Index, told from every other file by its digest."""

    package: str
    version: str
    filename: str
    sha256: str


def cache_folder() -> Path:
    """Where archives are kept: `$RNNSERVE_CACHE`, or `~/.cache/rnnserve`."""
    return Path(os.environ.get("RNNSERVE_CACHE") or Path.home() / ".cache" / "rnnserve")


def read_member(archive: Archive, member: str) -> bytes:
    """The bytes of one file of an archive, which is fetched where the cache does not have it.

    The digest covers the very bytes that are then opened. Raises DataError.
    """
    content = _verified_bytes(_fetch(archive), archive)
    try:
        return zipfile.ZipFile(io.BytesIO(content)).read(member)
    except KeyError:
        raise DataError(f"{archive.filename} holds no file {member}") from None


def _fetch(archive: Archive) -> Path:
    path = cache_folder() / archive.filename
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _download(archive, Path(folder))
            fresh = Path(folder) / archive.filename
            _verified_bytes(fresh, archive)
            fresh.replace(path)  # at once: nobody ever finds half an archive
    return path


def _download(archive: Archive, folder: Path) -> None:
    wanted = f"{archive.package}=={archive.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", wanted, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DataError(f"pip could not download {wanted}:\n{result.stderr.strip()}")


def _verified_bytes(path: Path, archive: Archive) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != archive.sha256:
        raise DataError(f"{path} has the SHA-256 {found}, not {archive.sha256}: it is damaged or not the one meant")
    return content
