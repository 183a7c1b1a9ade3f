"""The folder of what is computed of long sequences, which are in files without a name."""

from __future__ import annotations

import tempfile
from pathlib import Path

from service.addresses import StartError


def check(folder: Path | None) -> None:
    """Raises StartError."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise StartError(f"spill_dir: {folder or 'none'} cannot be written: {error.strerror}") from None
