"""HTTP as mosec speaks it."""

from __future__ import annotations


def body_of(received: bytes) -> bytes | None:
    """Of a response; None while a part of it is still to come. Raises RuntimeError if it is not 200."""
    head, blank, body = received.partition(b"\r\n\r\n")
    if not blank:
        return None
    status, *fields = head.lower().split(b"\r\n")
    (length,) = (int(field.partition(b":")[2]) for field in fields if field.startswith(b"content-length:"))
    if len(body) < length:
        return None
    if b" 200 " not in status + b" ":
        raise RuntimeError(f"not an answer: {status + b' ' + body!r}")
    return body
