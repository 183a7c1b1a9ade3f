"""Training data out of package archives: fetched by name, version and digest, read without installing them."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class DataError(RuntimeError):
    """An archive that could not be fetched, is not the one meant, or lacks a file."""


@dataclass(frozen=True)
class Archive:
    """A file of the Python Package Index, wheel or source, told from every other one by its digest."""

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
    return member_of(_fetched_bytes(archive), archive.filename, member)


def read_members(archive: Archive, folder: str, suffix: str) -> dict[str, bytes]:
    """All files of a wheel below a folder whose names end so. Raises DataError."""
    with zipfile.ZipFile(io.BytesIO(_fetched_bytes(archive))) as content:
        names = [name for name in content.namelist() if name.startswith(folder) and name.endswith(suffix)]
        if not names:
            raise DataError(f"{archive.filename} holds no file {folder}*{suffix}")
        return {name: content.read(name) for name in names}


def member_of(content: bytes, name: str, member: str) -> bytes:
    """The bytes of one file of a zip or tar archive of that name. Raises DataError."""
    try:
        if name.endswith(".tar.gz"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                file = tar.extractfile(member)
                if file is None:
                    raise KeyError(member)
                return file.read()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.read(member)
    except KeyError:
        raise DataError(f"{name} holds no file {member}") from None


def _fetched_bytes(archive: Archive) -> bytes:
    return _verified_bytes(_fetch(archive), archive)


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
    """By pip, which compares the digest itself before it looks into the archive."""
    wanted = f"{archive.package}=={archive.version}"
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{wanted} --hash=sha256:{archive.sha256}\n")
    kind = "--only-binary" if archive.filename.endswith(".whl") else "--no-binary"
    options = ["--no-deps", kind, ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--requirement", str(requirement), *options]
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
