"""What a snapshot is worth: it comes back bit for bit, or not at all."""

import hashlib
import hmac
import logging
import re
import subprocess
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models.manifest import ModelKey
from service.addresses import StartError
from service.app import serve
from service.errors import SnapshotInvalid
from service.sessions.record import Floats, SessionState
from service.sessions.snapshots import FORMAT_VERSION, SIGNATURE_BYTES, SnapshotKeys, decode, encode
from service.settings import Settings
from tests.support.server import ROOT

NOW_S = 1_700_000_000.25
LIFETIME_S = 60.0
OLD, NEW = bytes(range(32)), bytes(range(32, 64))
KEYS = SnapshotKeys({"old": OLD})
ROW = np.array([0.1, -0.0, 3.4e38, 1e-45], np.float32)


def state(row: Floats = ROW, **changes: Any) -> SessionState:
    return replace(SessionState(ModelKey("pump", 2), "ab" * 32, next_step=70_000, row=row, pending=3), **changes)


def encoded(keys: SnapshotKeys = KEYS, lifetime_s: float = LIFETIME_S) -> bytes:
    return encode(state(), keys, now_s=NOW_S, lifetime_s=lifetime_s)[1]


def why_refused(value: bytes, keys: SnapshotKeys = KEYS, now_s: float = NOW_S) -> str:
    with pytest.raises(SnapshotInvalid) as refusal:
        decode(value, keys, now_s=now_s)
    assert refusal.value.field == "snapshot"
    return refusal.value.metadata["why"]


def signed(*fields: object, key: bytes = OLD) -> bytes:
    """What a server of another format would export."""
    body: bytes = msgpack.packb(fields)
    return body + hmac.digest(key, body, hashlib.sha256)


@given(
    row=arrays.arrays(np.dtype("<f4"), st.integers(0, 40), elements=st.floats(width=32)),
    next_step=st.integers(0, 2**64 - 1),
    name=st.text(max_size=64),
    version=st.integers(1, 2**31 - 1),
)
def test_a_state_comes_back_bit_for_bit(row: Floats, next_step: int, name: str, version: int) -> None:
    written = state(row, next_step=next_step, model=ModelKey(name, version))
    snapshot, value = encode(written, KEYS, now_s=NOW_S, lifetime_s=LIFETIME_S)
    found = decode(value, KEYS, now_s=NOW_S)
    assert found.state.row.tobytes() == row.tobytes()
    for field in ("model", "weights_sha256", "next_step"):
        assert getattr(found.state, field) == getattr(written, field)
    assert (found.created_s, found.expires_s, found.key_id) == (snapshot.created_s, snapshot.expires_s, "old")


def test_a_change_of_any_byte_is_refused() -> None:
    value = encoded()
    for place in range(len(value)):
        for bit in range(8):
            changed = bytearray(value)
            changed[place] ^= 1 << bit
            assert why_refused(bytes(changed)) in ("damaged", "unknown_key")


def test_a_part_of_it_or_more_than_it_is_refused() -> None:
    value = encoded()
    for length in range(len(value)):
        assert why_refused(value[:length]) == "damaged"
    assert why_refused(value + b"\0") == "damaged"


@given(st.binary(max_size=300))
def test_what_never_was_a_snapshot_is_refused(value: bytes) -> None:
    assert why_refused(value) in ("damaged", "unknown_key")


def test_lists_that_only_claim_to_be_huge_cost_no_memory() -> None:
    nested = b"\xdd\x00\x00\x40\x00" * 20_000  # each of these lists says that it has 16,384 entries
    tracemalloc.start()
    try:
        assert why_refused(nested + bytes(SIGNATURE_BYTES)) == "damaged"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_it_cannot_be_imported_once_it_has_expired() -> None:
    assert decode(encoded(), KEYS, now_s=NOW_S + LIFETIME_S - 0.01).state.next_step == 70_000
    assert why_refused(encoded(), now_s=NOW_S + LIFETIME_S) == "expired"


def test_with_a_lifetime_of_zero_it_never_expires() -> None:
    assert decode(encoded(lifetime_s=0), KEYS, now_s=NOW_S * 10).expires_s == 0


def test_another_format_is_told_from_damage_if_its_signature_is_good() -> None:
    assert why_refused(signed(FORMAT_VERSION + 1, "old", "whatever", "comes")) == "format"
    assert why_refused(signed(FORMAT_VERSION + 1, "old", "whatever", key=NEW)) == "damaged"


def test_a_foreign_key_is_refused_whatever_it_is_called() -> None:
    assert why_refused(encoded(SnapshotKeys({"foreign": NEW}))) == "unknown_key"
    assert why_refused(encoded(SnapshotKeys({"old": NEW}))) == "damaged"


def test_after_a_rotation_the_new_key_signs_and_the_old_one_still_verifies() -> None:
    before, rotated = encoded(), SnapshotKeys({"new": NEW, "old": OLD})
    assert decode(before, rotated, now_s=NOW_S).key_id == "old"
    after = encoded(rotated)
    assert decode(after, SnapshotKeys({"new": NEW}), now_s=NOW_S).key_id == "new"
    assert why_refused(before, SnapshotKeys({"new": NEW})) == "unknown_key"
    assert why_refused(after) == "unknown_key"


def test_neither_the_session_nor_its_token_nor_its_answers_have_a_place_in_it() -> None:
    assert set(asdict(state())) == {"model", "weights_sha256", "next_step", "row", "pending"}
    fields = msgpack.unpackb(encoded()[:-SIGNATURE_BYTES], use_list=False)
    row = ROW.astype("<f4").tobytes()
    assert fields == (2, "old", "pump", 2, "ab" * 32, 70_000, row, NOW_S, NOW_S + LIFETIME_S, 3)


def test_the_first_key_of_a_file_signs_and_empty_lines_do_not_count() -> None:
    keys = SnapshotKeys.parse(f"\nnew:{NEW.hex()}\r\n\n  old:{OLD.hex().upper()}  \n")
    assert keys.signing_id == "new"
    assert decode(encoded(), keys, now_s=NOW_S).key_id == "old"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is no key in it"),
        (OLD.hex(), "line 1 is not <key id>:<64 hex digits>"),
        (f"a:{OLD.hex()}\nb:{OLD.hex()[:-2]}", "line 2 is not <key id>:<64 hex digits>"),
        (f"a:{OLD.hex()}00", "line 1 is not <key id>:<64 hex digits>"),
        (f"a b:{OLD.hex()}", "line 1 is not <key id>:<64 hex digits>"),
        (f"{'a' * 65}:{OLD.hex()}", "line 1 is not <key id>:<64 hex digits>"),
        (f"a:{OLD.hex()}\n\na:{NEW.hex()}", "line 3 has a key id that is there already"),
    ],
)
async def test_a_wrong_key_file_ends_the_start_and_no_key_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, sentence: str
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(StartError) as problem:
        await serve(Settings(snapshot_key_file=file, state_dir=tmp_path / "state"))
    assert str(problem.value) == f"snapshot_key_file: {file}: {sentence}"
    assert OLD.hex()[:8] not in str(problem.value) + caplog.text


async def test_a_key_file_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^snapshot_key_file: .*/keys cannot be read: No such file or directory$"):
        await serve(Settings(snapshot_key_file=tmp_path / "keys", state_dir=tmp_path / "state"))


def test_the_command_of_the_documentation_makes_a_key_file(tmp_path: Path) -> None:
    (command,) = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/snapshots.md").read_text(), re.DOTALL | re.MULTILINE)
    subprocess.run(["sh", "-euc", command], cwd=tmp_path, check=True)
    (file,) = tmp_path.iterdir()
    assert SnapshotKeys.parse(file.read_text()).signing_id
    assert file.stat().st_mode & 0o077 == 0
