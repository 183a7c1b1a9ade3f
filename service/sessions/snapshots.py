"""A session as a portable value: its state, signed, and neither its id nor its token nor its answers. No I/O.

A msgpack list, and then the HMAC-SHA-256 of that list. In every format the list begins with the format version and the
id of the key, and the signature is checked before anything else is believed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import msgpack
import numpy as np

from models.manifest import ModelKey
from service.errors import SnapshotInvalid
from service.sessions.record import SessionState

FORMAT_VERSION = 2
KEY_BYTES = 32
SIGNATURE_BYTES = 32
MAX_FIELDS = 64  # of any format: a list that only says that it is huge costs no memory
LITTLE_ENDIAN_FLOATS = np.dtype("<f4")
KEY_LINE = re.compile(rf"([A-Za-z0-9._-]{{1,64}}):([0-9A-Fa-f]{{{2 * KEY_BYTES}}})")

Why = Literal["damaged", "unknown_key", "expired", "format"]


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """A state, and for how long it may be imported."""

    state: SessionState
    created_s: float  # seconds since 1970
    expires_s: float  # likewise; 0 = never
    key_id: str


class SnapshotKeys:
    """Keys by their ids: the first one signs, all verify."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)
        self.signing_id = next(iter(self._keys))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of lines `key_id:64 hex digits`. Raises ValueError, which says where but never what stands there."""
        keys: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            if not (found := KEY_LINE.fullmatch(line.strip())):
                raise ValueError(f"line {number} is not <key id>:<{2 * KEY_BYTES} hex digits>")
            if found[1] in keys:
                raise ValueError(f"line {number} has a key id that is there already")
            keys[found[1]] = bytes.fromhex(found[2])
        if not keys:
            raise ValueError("there is no key in it")
        return cls(keys)

    def sign(self, body: bytes) -> bytes:
        """By the first key."""
        return _signature(self._keys[self.signing_id], body)

    def verify(self, key_id: str, body: bytes, signature: bytes) -> None:
        """Raises SnapshotInvalid."""
        key = self._keys.get(key_id)
        if key is None:
            raise _invalid("unknown_key", "the snapshot was signed by a key that this server does not know")
        if not hmac.compare_digest(signature, _signature(key, body)):
            raise _damaged()


def encode(state: SessionState, keys: SnapshotKeys, *, now_s: float, lifetime_s: float) -> tuple[Snapshot, bytes]:
    """The snapshot of a state, and its bytes; with a lifetime of 0 it never expires."""
    snapshot = Snapshot(state, now_s, now_s + lifetime_s if lifetime_s else 0.0, keys.signing_id)
    fields = (
        FORMAT_VERSION,
        snapshot.key_id,
        *state.model,
        state.weights_sha256,
        state.next_step,
        state.row.astype(LITTLE_ENDIAN_FLOATS, copy=False).tobytes(),
        snapshot.created_s,
        snapshot.expires_s,
        state.pending,
    )
    body: bytes = msgpack.packb(fields)
    return snapshot, body + keys.sign(body)


def decode(value: bytes, keys: SnapshotKeys, *, now_s: float) -> Snapshot:
    """The snapshot of which these are the bytes. Raises SnapshotInvalid."""
    body, signature = value[:-SIGNATURE_BYTES], value[-SIGNATURE_BYTES:]
    match _unpacked(body):
        case [version, str(key_id), *fields]:
            keys.verify(key_id, body, signature)
        case _:
            raise _damaged()
    if version != FORMAT_VERSION:
        text = f"the snapshot has the format version {version}; this server reads {FORMAT_VERSION} only"
        raise _invalid("format", text)
    snapshot = _snapshot_of(key_id, *fields)
    if 0 < snapshot.expires_s <= now_s:
        raise _invalid("expired", f"the snapshot expired {now_s - snapshot.expires_s:.0f} s ago")
    return snapshot


def _unpacked(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body, use_list=False, max_array_len=MAX_FIELDS, max_map_len=0, max_ext_len=0)
    except ValueError:
        raise _damaged() from None


def _snapshot_of(
    key_id: str,
    model_name: str,
    model_version: int,
    weights_sha256: str,
    next_step: int,
    row: bytes,
    created_s: float,
    expires_s: float,
    pending: int,
) -> Snapshot:
    floats = np.frombuffer(row, LITTLE_ENDIAN_FLOATS).astype(np.float32, copy=False)
    state = SessionState(ModelKey(model_name, model_version), weights_sha256, next_step, floats, pending)
    return Snapshot(state, created_s, expires_s, key_id)


def _signature(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, hashlib.sha256)


def _damaged() -> SnapshotInvalid:
    return _invalid("damaged", "the snapshot is not as it was exported")


def _invalid(why: Why, message: str) -> SnapshotInvalid:
    return SnapshotInvalid(message, field="snapshot", why=why)
