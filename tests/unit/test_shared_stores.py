"""What every store for several owners does: each test is one with two or three owners over one real store."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from service.sessions.record import SessionKey, SessionRecord, summary_of
from service.sessions.stores.redis import RedisStore
from service.sessions.stores.shared import SharedStore, StoredSession, Totals, Wanted
from service.sessions.stores.shared_sqlite import SharedSqliteStore
from tests.support.redis_server import RedisServer, needs_redis, start_redis
from tests.unit.test_session_stores import content, owing, record, records

MODEL = record("").model
NEWER = MODEL._replace(version=MODEL.version + 1)
FENCE = 7
LEASE_S = 60.0
TIMEOUT_S = 10.0
MakeStore = Callable[..., Awaitable[SharedStore]]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
async def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MakeStore]:
    """An owner who lives, over the store of this test."""
    async with AsyncExitStack() as stack:

        async def make(owner: str, on_wanted: Callable[[Wanted], None] = lambda _: None) -> SharedStore:
            store = _store(request, tmp_path)
            await store.open(owner, on_wanted)
            stack.push_async_callback(store.close)
            await store.renew(LEASE_S)
            return store

        yield make


def _store(request: pytest.FixtureRequest, folder: Path) -> SharedStore:
    if request.param == "sqlite":
        return SharedSqliteStore(folder / "sessions.sqlite")
    return RedisStore(request.getfixturevalue("redis").url, prefix=f"{folder}:", ttl_s=3_600.0)


def new(session_id: str, owner: str = "", *, tenant: str = "", used_s: float = 0.0) -> SessionRecord:
    """Never written; of a living owner, or parked."""
    return replace(record(session_id, tenant=tenant, used_s=used_s), fence=FENCE, owner=owner, is_new=True)


def next_of(written: SessionRecord) -> SessionRecord:
    return replace(written, next_step=written.next_step + 1, is_new=False)


def ids(found: list[StoredSession]) -> list[str]:
    return [stored.summary.key.session_id for stored in found]


async def until_dead(store: SharedStore, key: SessionKey) -> None:
    """Of a lease, which tells no event."""
    async with asyncio.timeout(TIMEOUT_S):
        while (found := await store.find(key)) and found.owner_lives:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# Writes


async def test_a_record_comes_back_with_fence_and_owner(make_store: MakeStore) -> None:
    store, written = await make_store("a"), replace(owing("s"), fence=FENCE, owner="a", is_new=True)
    assert await store.write([written]) == frozenset()
    assert content(await store.read(written.key)) == content(replace(written, is_new=False))
    assert await store.find(written.key) == StoredSession(summary_of(written), FENCE, "a", owner_lives=True)


async def test_a_new_record_is_refused_where_another_one_is(make_store: MakeStore) -> None:
    a, b = await make_store("a"), await make_store("b")
    await a.write([new("s", "a")])
    assert await b.write([replace(next_of(new("s", "b")), fence=8, is_new=True)]) == {SessionKey("", "s")}
    assert content(await b.read(SessionKey("", "s"))) == content(replace(new("s", "a"), is_new=False))


async def test_what_is_not_new_is_refused_where_nothing_is(make_store: MakeStore) -> None:
    store = await make_store("a")
    assert await store.write([next_of(new("s", "a"))]) == {SessionKey("", "s")}
    assert await store.read(SessionKey("", "s")) is None
    assert await store.totals() == Totals(0, 0)


async def test_only_the_records_with_a_wrong_fence_are_refused(make_store: MakeStore) -> None:
    store = await make_store("a")
    first = [new(name, "a") for name in "pqr"]
    await store.write(first)
    again = [replace(next_of(written), fence=FENCE + (written.key.session_id == "q")) for written in first]
    assert await store.write(again) == {SessionKey("", "q")}
    assert [(await store.read(r.key)).next_step for r in first] == [10, 9, 10]  # type: ignore[union-attr]


async def test_writes_and_erasures_take_effect_in_the_order_of_their_calls(make_store: MakeStore) -> None:
    store, p, q = await make_store("a"), new("p", "a"), new("q", "a")
    steps = [replace(q, next_step=step, is_new=step == 0) for step in range(30)]
    await asyncio.gather(store.write([p]), store.erase({p.key: FENCE}), *(store.write([step]) for step in steps))
    assert await store.read(p.key) is None
    assert content(await store.read(q.key)) == content(steps[-1])


async def test_nothing_to_write_or_to_erase_is_no_error(make_store: MakeStore) -> None:
    store = await make_store("a")
    assert await store.write([]) == frozenset()
    await store.erase({})
    await store.bury([])
    await store.probe()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(written=records)
async def test_every_record_comes_back_bit_for_bit(make_store: MakeStore, written: SessionRecord) -> None:
    if written.next_step >= 2**63 or written.model.version >= 2**63:
        return  # SQLite's numbers end there
    store = await make_store("a")
    await store.write([replace(written, fence=2**48, is_new=True)])
    assert content(await store.read(written.key)) == content(replace(written, fence=2**48))
    await store.erase({written.key: 2**48})
    await store.close()


# Takes


async def test_of_many_who_take_a_parked_session_exactly_one_gets_it(make_store: MakeStore) -> None:
    owners = [await make_store(name) for name in "abc"]
    await owners[0].write([new(f"s{number}") for number in range(20)])
    for number in range(20):
        key = SessionKey("", f"s{number}")
        taken = await asyncio.gather(*(owner.take(key, FENCE) for owner in owners for _ in range(3)))
        (winner,) = [found for found in taken if found]
        assert winner.fence == FENCE + 1
        found = await owners[0].find(key)
        assert found is not None
        assert (found.fence, found.owner) == (winner.fence, winner.owner)


async def test_a_living_owner_keeps_its_session(make_store: MakeStore) -> None:
    a, b = await make_store("a"), await make_store("b")
    await a.write([new("s", "a")])
    assert await b.take(SessionKey("", "s"), FENCE) is None
    assert await a.write([next_of(new("s", "a"))]) == frozenset()


async def test_an_owner_takes_its_own_session_again(make_store: MakeStore) -> None:
    store = await make_store("a")
    await store.write([new("s", "a")])
    taken = await store.take(SessionKey("", "s"), FENCE)
    assert content(taken) == content(replace(new("s", "a"), fence=FENCE + 1, is_new=False))


@pytest.mark.parametrize("end", ["lease", "bury", "close"])
async def test_the_session_of_a_dead_owner_is_taken_and_its_late_write_refused(make_store: MakeStore, end: str) -> None:
    a, b, key = await make_store("a"), await make_store("b"), SessionKey("", "s")
    await a.write([new("s", "a")])
    if end == "lease":
        await a.renew(0.1)
        await until_dead(b, key)
    elif end == "bury":
        await b.bury(["a"])
    else:
        await a.close()
    taken = await b.take(key, FENCE)
    assert content(taken) == content(replace(new("s", "b"), fence=FENCE + 1, is_new=False))
    late = await make_store("later") if end == "close" else a
    assert await late.write([next_of(new("s", "a"))]) == {key}
    await late.erase({key: FENCE})
    assert content(await b.read(key)) == content(taken)


async def test_a_take_with_an_old_fence_gets_nothing(make_store: MakeStore) -> None:
    a, b, key = await make_store("a"), await make_store("b"), SessionKey("", "s")
    await a.write([new("s")])
    await a.take(key, FENCE)
    await a.bury(["a"])
    assert await b.take(key, FENCE) is None
    assert await b.take(SessionKey("", "unknown"), FENCE) is None
    assert await b.take(key, FENCE + 1) is not None


async def test_fences_are_exact_beyond_what_a_float_holds(make_store: MakeStore) -> None:
    store, key, fence = await make_store("a"), SessionKey("", "s"), 2**53 + 1
    await store.write([replace(new("s"), fence=fence)])
    taken = await store.take(key, fence)
    assert taken is not None
    assert taken.fence == fence + 1


async def test_renew_tells_whether_the_owner_had_lived(make_store: MakeStore) -> None:
    a, b = await make_store("a"), await make_store("b")
    assert await a.renew(LEASE_S)
    await b.bury(["a"])
    assert not await a.renew(LEASE_S)
    assert await a.renew(LEASE_S)


# Erasures


async def test_only_what_has_its_fence_still_is_erased(make_store: MakeStore) -> None:
    store = await make_store("a")
    await store.write([new(name) for name in "pqr"])
    await store.erase({SessionKey("", "p"): FENCE, SessionKey("", "q"): FENCE + 1, SessionKey("", "x"): FENCE})
    assert ids(await store.after(SessionKey("", ""), 10)) == ["q", "r"]
    assert (await store.totals()).sessions == 2


async def test_a_scrub_erases_too_and_when_scrubs_have_ended_it_fails(make_store: MakeStore) -> None:
    store = await make_store("a")
    await store.write([new("p"), new("q")])
    await store.erase({SessionKey("", "p"): FENCE}, scrub=True)
    assert await store.read(SessionKey("", "p")) is None
    store.end_scrubs()
    with pytest.raises(Exception, match="ends"):
        await store.erase({}, scrub=True)
    assert await store.write([next_of(new("q"))]) == frozenset()


# Pages and totals


async def test_pages_are_of_one_tenant_by_id(make_store: MakeStore) -> None:
    store = await make_store("a")
    names = ["a", "b", "z", "é", "漢", "😀"]
    await store.write([new(name, tenant="me") for name in reversed(names)] + [new("c", tenant="them"), new("m")])
    pages, last = [], SessionKey("me", "")
    while page := await store.after(last, 2):
        pages.append(ids(page))
        last = page[-1].summary.key
    assert pages == [names[:2], names[2:4], names[4:]]
    assert ids(await store.after(SessionKey("nobody", ""), 2)) == []


async def test_totals_follow_every_change(make_store: MakeStore) -> None:
    store, size = await make_store("a"), record("").size_bytes
    await store.write([new("p", "a", tenant="me"), new("q", tenant="me"), new("r", tenant="them")])
    assert await store.totals() == Totals(3, 3 * size)
    assert await store.totals("me") == Totals(2, 2 * size)
    assert await store.parked_totals() == {MODEL: Totals(2, 2 * size)}
    await store.write([replace(next_of(new("p", tenant="me")), row=np.zeros(10, np.float32))])
    assert await store.totals() == Totals(3, 2 * size + 40)
    assert await store.parked_totals() == {MODEL: Totals(3, 2 * size + 40)}
    await store.take(SessionKey("me", "q"), FENCE)
    assert await store.parked_totals() == {MODEL: Totals(2, size + 40)}
    await store.erase({SessionKey("me", "p"): FENCE, SessionKey("me", "q"): FENCE + 1})
    assert await store.totals("me") == Totals(0, 0)
    assert await store.totals() == Totals(1, size)
    assert await store.parked_totals() == {MODEL: Totals(1, size)}


async def test_what_is_parked_is_counted_by_model(make_store: MakeStore) -> None:
    store, size = await make_store("a"), record("").size_bytes
    live = replace(new("live", "a"), model=NEWER)
    await store.write([new("p"), live, *(replace(new(name), model=NEWER) for name in "qr")])
    assert await store.parked_totals() == {MODEL: Totals(1, size), NEWER: Totals(2, 2 * size)}
    await store.take(SessionKey("", "p"), FENCE)
    await store.write([replace(next_of(live), owner="")])
    counted = await store.parked_totals()
    assert counted.get(MODEL, Totals(0, 0)) == Totals(0, 0)
    assert counted[NEWER] == Totals(3, 3 * size)


async def test_the_longest_parked_are_those_that_no_living_owner_has(make_store: MakeStore) -> None:
    a, b = await make_store("a"), await make_store("b")
    await a.write(
        [new("p", used_s=5), new("q", "a", used_s=1), new("r", "b", used_s=2), new("s", used_s=3, tenant="t")]
    )
    assert ids(await a.longest_parked(10)) == ["s", "p"]
    await a.bury(["b"])
    assert ids(await a.longest_parked(10)) == ["r", "s", "p"]
    assert ids(await a.longest_parked(2)) == ["r", "s"]
    assert ids(await a.longest_parked(10, tenant="")) == ["r", "p"]
    assert ids(await b.longest_parked(10, used_before_s=5)) == ["r", "s"]
    assert ids(await b.longest_parked(10, tenant="t", used_before_s=3)) == []


# Wants


async def test_what_is_wanted_reaches_its_owner_only(make_store: MakeStore) -> None:
    heard: asyncio.Queue[tuple[str, Wanted]] = asyncio.Queue()
    a = await make_store("a", lambda wanted: heard.put_nowait(("a", wanted)))
    await make_store("b", lambda wanted: heard.put_nowait(("b", wanted)))
    sent = [Wanted(SessionKey("me", "é"), deleted=False), Wanted(SessionKey("", "s"), deleted=True)]
    await a.want("nobody", sent[0])
    await a.want("b", sent[0])
    await a.want("b", sent[1])
    await a.want("a", sent[1])
    async with asyncio.timeout(TIMEOUT_S):
        got = [await heard.get() for _ in range(3)]
    assert [wanted for name, wanted in got if name == "b"] == sent
    assert [wanted for name, wanted in got if name == "a"] == sent[1:]
    assert heard.empty()
