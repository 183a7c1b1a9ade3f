import asyncio
import random
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models.manifest import ModelKey
from service.sessions.record import Floats, HeldAnswer, SessionKey, SessionRecord, summary_of
from service.sessions.stores import record_codec, sqlite_file
from service.sessions.stores.memory import MemoryStore
from service.sessions.stores.record_codec import decode_record, encode_record
from service.sessions.stores.sqlite import SqliteStore
from service.sessions.stores.sqlite_schema import MIGRATIONS
from service.sessions.stores.store import RecordUnreadable, SessionStore, StoreError

BUSY_TIMEOUT_S = 0.05
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"  # in place of VACUUM
ROW = np.array([0.1, -0.0, 3.4e38, 1e-45], np.float32)


def record(session_id: str, *, tenant: str = "", row: Floats = ROW, used_s: float = 0.0) -> SessionRecord:
    return SessionRecord(
        key=SessionKey(tenant, session_id),
        model=ModelKey("pump", 2),
        weights_sha256="ab" * 32,
        token_hash=bytes(range(32)),
        next_step=9,
        answered_step=4,
        row=row,
        opened_s=1.7e9 + 0.1,
        used_s=used_s,
    )


def owing(session_id: str) -> SessionRecord:
    """A record with unacknowledged answers and resets."""
    outputs = np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2)
    held = (HeldAnswer(4, 7, outputs), HeldAnswer(7, 9, outputs[2:]))
    return replace(record(session_id), held=held, resets=(4, 7), pending=2)


def content(value: Any) -> Any:
    """Everything in a record, to compare: arrays by their bytes."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, SessionRecord):
        return [content(getattr(value, part.name)) for part in fields(value)]
    return list(map(content, value)) if isinstance(value, tuple) else value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "sessions.sqlite"


@pytest.fixture
async def sqlite_store(file: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(file, busy_timeout_s=BUSY_TIMEOUT_S)
    await store.open()
    yield store
    await store.close()


@pytest.fixture(params=["memory", "sqlite", "sqlite, safe from power loss"])
async def store(request: pytest.FixtureRequest, file: Path) -> AsyncIterator[SessionStore]:
    safe = request.param != "sqlite"
    store = MemoryStore() if request.param == "memory" else SqliteStore(file, power_loss_safe=safe)
    assert await store.open() == []
    yield store
    await store.close()


# Every store


@pytest.mark.parametrize("written", [record("a"), owing("a"), record("a", row=np.empty(0, np.float32))])
async def test_a_record_comes_back_as_it_was(store: SessionStore, written: SessionRecord) -> None:
    await store.write([written])
    assert content(await store.read(written.key)) == content(written)


async def test_the_last_record_of_a_key_is_kept(store: SessionStore) -> None:
    for written in (record("a"), owing("a"), replace(record("a"), next_step=10)):
        await store.write([written])
        assert content(await store.read(written.key)) == content(written)
    await store.write([replace(record("a"), next_step=step) for step in (11, 12)])
    assert [summary.next_step for summary in await store.open()] == [12]


async def test_nothing_is_read_of_an_unknown_key(store: SessionStore) -> None:
    await store.write([record("a")])
    assert await store.read(SessionKey("", "b")) is None


@pytest.mark.parametrize("scrub", [False, True])
async def test_what_is_erased_is_gone_and_the_rest_stays(store: SessionStore, scrub: bool) -> None:
    a, b, c = record("a"), record("b"), record("c")
    await store.write([a, b, c])
    await store.erase([a.key, c.key, SessionKey("", "unknown")], scrub=scrub)
    assert [await store.read(gone.key) for gone in (a, c)] == [None, None]
    assert content(await store.read(b.key)) == content(b)


async def test_summaries_come_the_longest_unused_first(store: SessionStore) -> None:
    records = [record("a", used_s=3.5), record("b", used_s=1.25), replace(owing("c"), used_s=2.0)]
    await store.write(records)
    await store.write([record("b", used_s=9.0)])
    assert await store.open() == [summary_of(records[2]), summary_of(records[0]), summary_of(record("b", used_s=9.0))]


async def test_the_same_id_of_two_tenants_is_two_sessions(store: SessionStore) -> None:
    mine, theirs = record("a", tenant="me"), replace(owing("a"), key=SessionKey("them", "a"))
    await store.write([mine, theirs])
    await store.erase([mine.key])
    assert await store.read(mine.key) is None
    assert content(await store.read(theirs.key)) == content(theirs)


async def test_writes_and_erasures_take_effect_in_the_order_of_their_calls(store: SessionStore) -> None:
    a, b = record("a"), record("b")
    await asyncio.gather(store.write([a]), store.erase([a.key]), store.erase([b.key]), store.write([b]))
    assert await store.read(a.key) is None
    assert content(await store.read(b.key)) == content(b)


async def test_a_read_sees_what_had_been_written_when_it_was_called(store: SessionStore) -> None:
    for step in range(20):
        await store.write([replace(record("a"), next_step=step)])
        found = await store.read(record("a").key)
        assert found is not None
        assert found.next_step == step


async def test_a_probe_changes_nothing(store: SessionStore) -> None:
    await store.write([record("a")])
    await store.probe()
    assert await store.open() == [summary_of(record("a"))]


async def test_when_scrubs_have_ended_the_rest_still_works(store: SessionStore) -> None:
    await store.write([record("a")])
    store.end_scrubs()
    await store.erase([record("a").key])
    await store.write([record("b")])
    assert [summary.key.session_id for summary in await store.open()] == ["b"]


async def test_nothing_to_write_or_to_erase_is_no_error(store: SessionStore) -> None:
    await store.write([])
    await store.erase([])
    await store.erase([], scrub=True)


async def test_closing_twice_is_closing_once(store: SessionStore) -> None:
    await store.close()
    await store.close()


# SQLite


async def test_sessions_survive_reopening(sqlite_store: SqliteStore, file: Path) -> None:
    await sqlite_store.write([record("a", used_s=2.0), owing("b")])
    await sqlite_store.close()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    again = SqliteStore(file)
    assert await again.open() == [summary_of(owing("b")), summary_of(record("a", used_s=2.0))]
    assert content(await again.read(owing("b").key)) == content(owing("b"))
    await again.close()


async def test_what_was_written_is_there_without_closing(sqlite_store: SqliteStore, file: Path) -> None:
    await sqlite_store.write([record("a")])
    other = SqliteStore(file)
    assert await other.open() == [summary_of(record("a"))]
    await other.close()


async def test_a_closed_store_refuses(sqlite_store: SqliteStore) -> None:
    await sqlite_store.close()
    with pytest.raises(StoreError, match="is closed"):
        await sqlite_store.read(record("a").key)


async def test_a_locked_file_fails_a_write_soon_and_later_writes_work(sqlite_store: SqliteStore, file: Path) -> None:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    start_s = time.monotonic()
    with pytest.raises(StoreError, match=r"sessions\.sqlite failed: database is locked"):
        await sqlite_store.write([record("a")])
    assert BUSY_TIMEOUT_S * 0.9 < time.monotonic() - start_s < 5.0
    other.close()
    await sqlite_store.write([record("b")])
    assert [summary.key.session_id for summary in await sqlite_store.open()] == ["b"]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(replace(record("bad"), resets=(2**64,)), id="does not fit the codec"),
        pytest.param(replace(record("bad"), next_step=2**63), id="does not fit a column"),
    ],
)
async def test_a_batch_with_one_bad_record_is_not_written_at_all(sqlite_store: SqliteStore, bad: SessionRecord) -> None:
    await sqlite_store.write([record("a")])
    with pytest.raises(StoreError):
        await sqlite_store.write([owing("a"), record("b"), bad, record("c")])
    assert await sqlite_store.open() == [summary_of(record("a"))]
    await sqlite_store.write([record("b")])
    assert len(await sqlite_store.open()) == 2


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """As on a full disk: no file grows beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_full_disk_fails_the_whole_batch_and_later_writes_work(sqlite_store: SqliteStore) -> None:
    await sqlite_store.write([record("a")])
    batch = [record(str(number), row=np.ones(1_000, np.float32)) for number in range(1_000)]
    with largest_file(1_000_000):
        with pytest.raises(StoreError):
            await sqlite_store.write([owing("a"), *batch])
        assert await sqlite_store.open() == [summary_of(record("a"))]
    await sqlite_store.write(batch)
    assert len(await sqlite_store.open()) == 1_001


async def test_a_file_of_a_newer_schema_is_refused_and_not_touched(sqlite_store: SqliteStore, file: Path) -> None:
    await sqlite_store.close()
    with sqlite3.connect(file) as other:
        other.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 7}")
    other.close()
    before = _all_of(file)
    store = SqliteStore(file)
    with pytest.raises(StoreError, match=f"version {len(MIGRATIONS) + 7}.*{len(MIGRATIONS)}"):
        await store.open()
    await store.close()
    assert _all_of(file) == before


async def test_a_damaged_file_is_refused_and_opens_when_it_was_repaired(file: Path) -> None:
    _put(file, b"no database at all" * 1_000)
    store = SqliteStore(file)
    with pytest.raises(StoreError, match=r"sessions\.sqlite failed: file is not a database"):
        await store.open()
    _put(file, b"")
    await store.write([record("a")])
    assert await store.open() == [summary_of(record("a"))]
    await store.close()


async def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    store = SqliteStore(tmp_path / "state" / "sessions.sqlite")
    with pytest.raises(StoreError, match="state"):
        await store.open()
    await store.close()


async def test_a_damaged_record_is_an_error_and_the_others_are_read(sqlite_store: SqliteStore, file: Path) -> None:
    await sqlite_store.write([record("a"), record("b")])
    with sqlite3.connect(file) as other:
        other.execute("UPDATE sessions SET record = x'93' WHERE session_id = 'a'")
    other.close()
    with pytest.raises(RecordUnreadable, match="damaged"):
        await sqlite_store.read(record("a").key)
    assert content(await sqlite_store.read(record("b").key)) == content(record("b"))


@pytest.mark.parametrize("seed", range(6))  # without VACUUM, bytes are left at three of them
async def test_scrubbing_leaves_no_byte_in_any_file(sqlite_store: SqliteStore, file: Path, seed: int) -> None:
    """Sessions of many sizes are rewritten until SQLite has moved them about in its pages."""
    chance = random.Random(seed)
    marker = np.frombuffer(b"ROW-MARK", np.float32)
    names = [f"ID-MARK-{number}" if number % 5 == 0 else f"{number}" * chance.choice([1, 10]) for number in range(600)]
    keys = [SessionKey("", name) for name in names]
    marked = {key for key in keys if "MARK" in key.session_id}

    def rewritten(key: SessionKey, used_s: float) -> SessionRecord:
        size = chance.choice([4, 16, 64, 200, 512, 2_500])
        row = np.tile(marker, size) if key in marked else np.zeros(size, np.float32)
        return replace(record("", row=row, used_s=used_s), key=key)

    for turn in range(15):
        await sqlite_store.write([rewritten(key, turn + chance.random()) for key in chance.sample(keys, 100)])
        await sqlite_store.erase(chance.sample(keys, 60))
    others = sum(summary.key not in marked for summary in await sqlite_store.open())
    assert min(_occurrences(file, b"ID-MARK"), _occurrences(file, b"ROW-MARK")) > 0
    await sqlite_store.erase(list(marked), scrub=True)
    assert (_occurrences(file, b"ID-MARK"), _occurrences(file, b"ROW-MARK")) == (0, 0)
    assert len(await sqlite_store.open()) == others > 0


async def test_scrubbing_fails_while_another_reader_keeps_the_log_and_works_later(
    sqlite_store: SqliteStore, file: Path
) -> None:
    await sqlite_store.write([record("ID-MARK")])
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM sessions").fetchall()
    with pytest.raises(StoreError, match="another process"):
        await sqlite_store.erase([record("ID-MARK").key], scrub=True)
    other.close()
    await sqlite_store.erase([record("ID-MARK").key], scrub=True)
    assert _occurrences(file, b"ID-MARK") == 0


async def test_a_read_waits_for_no_write(sqlite_store: SqliteStore, file: Path) -> None:
    await sqlite_store.write([record("a")])
    patient = SqliteStore(file, busy_timeout_s=60)
    await patient.open()
    with _locked(file):
        writing = asyncio.create_task(patient.write([record("b")]))
        async with asyncio.timeout(10):
            assert content(await patient.read(record("a").key)) == content(record("a"))
        assert not writing.done()
    await writing
    await patient.close()


async def test_a_read_waits_for_no_scrub(sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "REWRITE", ENDLESS)
    await sqlite_store.write([record("a")])
    scrubbing = asyncio.create_task(sqlite_store.erase([], scrub=True))
    async with asyncio.timeout(10):
        assert content(await sqlite_store.read(record("a").key)) == content(record("a"))
    assert not scrubbing.done()
    sqlite_store.end_scrubs()
    with pytest.raises(StoreError):
        await scrubbing


async def test_a_read_leaves_no_snapshot_that_would_keep_the_log(sqlite_store: SqliteStore, file: Path) -> None:
    await sqlite_store.write([record("ID-MARK"), record("b")])
    for _ in range(3):
        await sqlite_store.read(record("ID-MARK").key)
        await sqlite_store.read(record("b").key)
    await sqlite_store.erase([record("ID-MARK").key], scrub=True)
    assert _occurrences(file, b"ID-MARK") == 0
    assert await sqlite_store.read(record("ID-MARK").key) is None


async def test_a_probe_fails_where_a_write_would(sqlite_store: SqliteStore, file: Path) -> None:
    with _locked(file), pytest.raises(StoreError, match="locked"):
        await sqlite_store.probe()
    with largest_file(0), pytest.raises(StoreError):
        await sqlite_store.probe()
    await sqlite_store.probe()
    await sqlite_store.write([record("a")])


async def test_when_scrubs_end_one_that_runs_fails_and_what_waits_goes_on(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "REWRITE", ENDLESS)
    await sqlite_store.write([record("a")])
    scrubbing = asyncio.create_task(sqlite_store.erase([record("a").key], scrub=True))
    await _until(lambda: sqlite_store._file.scrubbing)
    writing = asyncio.create_task(sqlite_store.write([record("b")]))
    sqlite_store.end_scrubs()
    async with asyncio.timeout(10):
        with pytest.raises(StoreError):
            await scrubbing
        await writing
        with pytest.raises(StoreError, match="ends soon"):
            await sqlite_store.erase([], scrub=True)
    assert [summary.key.session_id for summary in await sqlite_store.open()] == ["b"]


async def test_closing_ends_what_runs_and_refuses_what_waits(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "REWRITE", ENDLESS)
    scrubbing = asyncio.create_task(sqlite_store.erase([], scrub=True))
    await _until(lambda: sqlite_store._file.scrubbing)
    writing = asyncio.create_task(sqlite_store.write([record("b")]))
    await asyncio.sleep(0)  # it is asked
    await sqlite_store.close(10)
    for refused in (scrubbing, writing):
        with pytest.raises(StoreError):
            await refused


async def test_closing_waits_no_longer_than_it_may(sqlite_store: SqliteStore, file: Path) -> None:
    patient = SqliteStore(file, busy_timeout_s=60)
    await patient.open()
    with _locked(file):
        writing = asyncio.create_task(patient.write([record("a")]))
        await asyncio.sleep(0)  # it is asked
        async with asyncio.timeout(10):
            await patient.close(0.05)
    with suppress(StoreError):
        await writing


def test_a_thread_that_hangs_holds_up_no_exit() -> None:
    program = """
import asyncio, threading
from service.sessions.stores.daemon_thread import DaemonThread

async def main():
    hangs = threading.Event()
    hanging = asyncio.create_task(DaemonThread("hanging").do(lambda: (hangs.set(), threading.Event().wait())))
    await asyncio.to_thread(hangs.wait)

asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)


async def _until(condition: Callable[[], bool]) -> None:
    """Of a thread, which tells no event."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Another process writes, and does not end."""
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


def _all_of(file: Path) -> bytes:
    return file.read_bytes()


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)


def _occurrences(file: Path, pattern: bytes) -> int:
    return sum(path.read_bytes().count(pattern) for path in file.parent.iterdir())


# The codec

steps = st.integers(0, 2**64 - 1)
times = st.floats(allow_nan=False)
texts = st.text(max_size=20)


def bits(shape: Any) -> st.SearchStrategy[Floats]:
    """Floats of any bit pattern."""
    return arrays.arrays(np.uint32, shape).map(lambda values: values.view(np.float32))


records = st.builds(
    SessionRecord,
    key=st.builds(SessionKey, texts, texts),
    model=st.builds(ModelKey, texts, steps),
    weights_sha256=texts,
    token_hash=st.binary(max_size=32),
    next_step=steps,
    answered_step=steps,
    row=bits(st.integers(0, 40)),
    held=st.lists(
        st.builds(HeldAnswer, steps, steps, bits(st.tuples(st.integers(0, 4), st.integers(0, 4)))), max_size=3
    ).map(tuple),
    resets=st.lists(steps, max_size=3).map(tuple),
    opened_s=times,
    used_s=times,
)


@given(written=records)
def test_decoding_is_the_inverse_of_encoding(written: SessionRecord) -> None:
    assert content(decode_record(encode_record(written))) == content(written)


def test_rows_that_are_views_are_encoded_as_what_they_show() -> None:
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    viewed = replace(record("a", row=table[:, 1]), held=(HeldAnswer(0, 3, table[:, ::2]),))
    assert content(decode_record(encode_record(viewed))) == content(viewed)


VALUE = encode_record(owing("a"))


@given(place=st.integers(0, len(VALUE) - 1), change=st.integers(1, 255))
def test_any_changed_byte_is_refused(place: int, change: int) -> None:
    damaged = bytearray(VALUE)
    damaged[place] ^= change
    with pytest.raises(RecordUnreadable, match="damaged"):
        decode_record(bytes(damaged))


@given(value=st.integers(0, len(VALUE) - 1).map(lambda size: VALUE[:size]) | st.binary(max_size=50))
def test_a_part_of_a_record_and_anything_else_is_refused(value: bytes) -> None:
    with pytest.raises(RecordUnreadable, match="damaged"):
        decode_record(value)


@pytest.mark.parametrize("body", [[], 7, None, [2], [2, "only", "a few"], {}])
def test_a_list_of_the_wrong_parts_is_refused(body: object) -> None:
    packed = msgpack.packb(body)
    with pytest.raises(RecordUnreadable, match="damaged"):
        decode_record(packed + record_codec.checksum_of(packed))


def test_an_unknown_format_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_codec, "FORMAT_VERSION", 8)
    newer = encode_record(record("a"))
    monkeypatch.undo()
    with pytest.raises(StoreError, match="format version 8; this server reads 2 only"):
        decode_record(newer)
