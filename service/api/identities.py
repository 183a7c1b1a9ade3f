"""What clients make up to name their sessions, and to come back to them."""

from __future__ import annotations

import re

from service.errors import FieldInvalid

TOKEN_BYTES = 16
SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def check_session_id(session_id: str, *, field: str = "session_id") -> None:
    """Raises FieldInvalid."""
    if not SESSION_ID.fullmatch(session_id):
        raise FieldInvalid("a session id has 1 to 128 characters of A-Z, a-z, 0-9, '.', '_', '-', ':'", field=field)


def check_token(token: bytes, *, field: str = "resume_token") -> None:
    """Raises FieldInvalid."""
    if len(token) != TOKEN_BYTES:
        raise FieldInvalid(f"a resume token has {TOKEN_BYTES} bytes", field=field)
