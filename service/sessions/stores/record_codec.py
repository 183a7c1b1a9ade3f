"""Records as bytes: a msgpack list that begins with its format version, and then the CRC-32 of that list."""

from __future__ import annotations

import zlib

import msgpack
import numpy as np

from models.manifest import model_key
from service.sessions.record import Floats, HeldAnswer, SessionKey, SessionRecord
from service.sessions.stores.store import RecordUnreadable, StoreError

FORMAT_VERSION = 2
CHECKSUM_BYTES = 4  # of every format version, for a damaged version number must not pass for another version
LITTLE_ENDIAN_FLOATS = np.dtype("<f4")


def encode_record(record: SessionRecord) -> bytes:
    """The whole record; its floats bit for bit. Raises StoreError."""
    fields = (
        FORMAT_VERSION,
        *record.key,
        *record.model,
        record.weights_sha256,
        record.token_hash,
        record.next_step,
        record.answered_step,
        _bytes_of(record.row),
        [
            (answer.first_step, answer.next_step, answer.outputs.shape, _bytes_of(answer.outputs))
            for answer in record.held
        ],
        record.resets,
        record.opened_s,
        record.used_s,
        record.caller_id,
        record.pending,
    )
    try:
        body: bytes = msgpack.packb(fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"the session {record.key.session_id!r} cannot be encoded: {error}") from error
    return body + checksum_of(body)


def decode_record(value: bytes) -> SessionRecord:
    """The record of which these are the bytes. Raises RecordUnreadable."""
    body = value[:-CHECKSUM_BYTES]
    if value[-CHECKSUM_BYTES:] != checksum_of(body):
        raise RecordUnreadable("a stored session is damaged: its checksum is wrong")
    try:
        version, *fields = msgpack.unpackb(body, use_list=False)
        if version != FORMAT_VERSION:
            raise RecordUnreadable(
                f"a stored session has the format version {version!r}; this server reads {FORMAT_VERSION} only"
            )
        return _record_of(*fields)
    except (TypeError, ValueError) as error:
        raise RecordUnreadable(f"a stored session is damaged: {error}") from error


def _record_of(
    tenant: str,
    session_id: str,
    model_name: str,
    model_version: int,
    weights_sha256: str,
    token_hash: bytes,
    next_step: int,
    answered_step: int,
    row: bytes,
    held: tuple[tuple[int, int, tuple[int, ...], bytes], ...],
    resets: tuple[int, ...],
    opened_s: float,
    used_s: float,
    caller_id: bytes,
    pending: int,
) -> SessionRecord:
    return SessionRecord(
        key=SessionKey(tenant, session_id),
        model=model_key(model_name, model_version),
        weights_sha256=weights_sha256,
        token_hash=token_hash,
        next_step=next_step,
        answered_step=answered_step,
        row=_floats_of(row),
        held=tuple(
            HeldAnswer(first, after, _floats_of(outputs).reshape(shape)) for first, after, shape, outputs in held
        ),
        resets=resets,
        opened_s=opened_s,
        used_s=used_s,
        caller_id=caller_id,
        pending=pending,
    )


def _bytes_of(floats: Floats) -> bytes:
    return floats.astype(LITTLE_ENDIAN_FLOATS, copy=False).tobytes()


def _floats_of(value: bytes) -> Floats:
    return np.frombuffer(value, LITTLE_ENDIAN_FLOATS).astype(np.float32, copy=False)


def checksum_of(body: bytes) -> bytes:
    """What follows the list."""
    return zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "little")
