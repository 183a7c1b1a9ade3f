"""What every store of several owners does; each store object here is an owner of its own."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from service.sessions.record import SessionKey, SessionRecord
from service.sessions.stores.redis import RedisStore
from service.sessions.stores.shared import StoredSession, Totals, Wanted
from service.sessions.stores.shared_sqlite import SharedSqliteStore
from service.sessions.stores.store import StoreError
from tests.support.redis_server import RedisServer, redis_server
from tests.unit.test_session_stores import content, owing, record

Store: TypeAlias = SharedSqliteStore | RedisStore
Open: TypeAlias = Callable[[str], Awaitable[Store]]

LEASE_S = 60.0
SHORT_LEASE_S = 0.2
TIMEOUT_S = 10.0


@pytest.fixture(params=["sqlite", "redis"])
async def open_(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens a store as that owner, who lives."""
    if request.param == "sqlite":
        make: Callable[[], Store] = partial(SharedSqliteStore, tmp_path / "sessions.sqlite")
    else:
        redis: RedisServer = request.getfixturevalue("redis")
        make = partial(RedisStore, redis.url, prefix=f"{uuid.uuid4()}:", ttl_s=60.0, timeout_s=TIMEOUT_S)
    async with AsyncExitStack() as stack:

        async def open_as(owner: str) -> Store:
            store = make()
            await store.open(owner, wants.append)
            await store.renew(LEASE_S)
            stack.push_async_callback(store.close, 1.0)
            return store

        wants: list[Wanted] = []
        open_as.wants = wants  # type: ignore[attr-defined]
        yield open_as


def new(session_id: str, fence: int = 7, **fields: object) -> SessionRecord:
    return replace(record(session_id), fence=fence, is_new=True, **fields)  # type: ignore[arg-type]


def of(written: SessionRecord) -> SessionRecord:
    """As it is read: what is new is no longer."""
    return replace(written, is_new=False)


def ids(found: list[StoredSession]) -> list[str]:
    return [stored.summary.key.session_id for stored in found]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not await condition():  # noqa: ASYNC110 - another process knows, when it is asked
            await asyncio.sleep(0.01)


async def test_a_record_comes_back_as_it_was(open_: Open) -> None:
    store = await open_("a")
    written = replace(owing("s"), fence=7, is_new=True, owner="a")
    assert await store.write([written]) == frozenset()
    found = await store.read(written.key)
    assert content(found) == content(of(written))


async def test_nothing_is_written_where_nothing_is_but_what_is_new(open_: Open) -> None:
    store = await open_("a")
    assert await store.write([replace(record("s"), fence=7)]) == {SessionKey("", "s")}
    assert await store.read(SessionKey("", "s")) is None


async def test_only_whoever_has_the_fence_changes_a_record(open_: Open) -> None:
    a, b = await open_("a"), await open_("b")
    await a.write([new("s"), new("t")])
    later = [replace(record("s"), fence=8, next_step=99), replace(record("t"), fence=7, next_step=10)]
    assert await b.write(later) == {SessionKey("", "s")}
    assert [stored.summary.next_step for stored in await a.after(SessionKey("", ""), 9)] == [9, 10]
    assert await b.write([new("s", fence=9)]) == {SessionKey("", "s")}
    await b.erase({SessionKey("", "s"): 8})
    assert ids(await a.after(SessionKey("", ""), 9)) == ["s", "t"]
    await b.erase({SessionKey("", "s"): 7, SessionKey("", "unknown"): 7})
    assert ids(await a.after(SessionKey("", ""), 9)) == ["t"]


async def test_what_may_have_been_written_already_may_be_written_again(open_: Open) -> None:
    store = await open_("a")
    for _ in range(2):
        assert await store.write([new("s")]) == frozenset()


async def test_a_parked_session_is_taken_with_another_fence(open_: Open) -> None:
    a, b = await open_("a"), await open_("b")
    await a.write([new("s")])
    taken = await b.take(SessionKey("", "s"), 7)
    assert taken is not None
    assert (taken.owner, taken.fence) != ("", 7)
    assert await a.write([replace(record("s"), fence=7)]) == {SessionKey("", "s")}
    assert await b.write([replace(record("s"), fence=taken.fence, owner="b")]) == frozenset()
    assert await a.take(SessionKey("", "s"), 7) is None
    assert await a.take(SessionKey("", "unknown"), 7) is None


async def test_of_many_that_take_a_session_at_once_one_has_it(open_: Open) -> None:
    stores = [await open_(name) for name in "abcdefgh"]
    await stores[0].write([new("s")])
    taken = await asyncio.gather(*(store.take(SessionKey("", "s"), 7) for store in stores))
    assert sum(one is not None for one in taken) == 1


async def test_the_session_of_an_owner_who_lives_is_not_taken(open_: Open) -> None:
    a, b = await open_("a"), await open_("b")
    await a.write([new("s", owner="a")])
    assert await b.take(SessionKey("", "s"), 7) is None
    assert await a.take(SessionKey("", "s"), 7) is not None


@pytest.mark.parametrize("death", ["silence", "burial"])
async def test_the_session_of_a_dead_owner_is_taken(open_: Open, death: str) -> None:
    a, b = await open_("a"), await open_("b")
    await a.write([new("s", owner="a")])
    if death == "silence":
        await a.renew(SHORT_LEASE_S)
        await until(lambda: _is_dead(b))
    else:
        await b.bury(["a", "nobody"])
    taken = await b.take(SessionKey("", "s"), 7)
    assert taken is not None
    assert taken.owner == "b"


async def _is_dead(store: Store) -> bool:
    stored = await store.find(SessionKey("", "s"))
    return stored is not None and not stored.owner_lives


async def test_an_owner_hears_whether_it_has_lived(open_: Open) -> None:
    a, b = await open_("a"), await open_("b")
    assert await a.renew(LEASE_S)
    await b.bury(["a"])
    assert not await a.renew(LEASE_S)
    assert await a.renew(LEASE_S)


async def test_what_somebody_wants_reaches_the_owner(open_: Open) -> None:
    a, b = await open_("a"), await open_("b")
    wants: list[Wanted] = open_.wants  # type: ignore[attr-defined]
    wanted = Wanted(SessionKey("tenant", "s"), deleted=True)

    async def heard() -> bool:
        await b.want("a", wanted)
        return bool(wants)

    await b.want("nobody", wanted)
    await until(heard)
    assert set(wants) == {wanted}
    assert a is not b


async def test_pages_go_by_id_and_tell_who_has_a_session(open_: Open) -> None:
    store = await open_("a")
    await store.write([new("c"), new("a", owner="a"), new("b", owner="dead"), new("other", key=SessionKey("x", "a"))])
    found = await store.after(SessionKey("", ""), 9)
    assert [(s.summary.key.session_id, s.owner, s.owner_lives) for s in found] == [
        ("a", "a", True), ("b", "dead", False), ("c", "", False),
    ]  # fmt: skip
    assert ids(await store.after(SessionKey("", "a"), 1)) == ["b"]
    assert await store.find(SessionKey("x", "c")) is None


async def test_totals_follow_every_change(open_: Open) -> None:
    a, b = await open_("a"), await open_("b")
    row = np.zeros(10, np.float32)
    await a.write([new("s", row=row), new("t", row=row, owner="a"), new("u", row=row, key=SessionKey("x", "u"))])
    assert (await a.totals(), await a.totals("x"), await a.parked_totals()) == (
        Totals(3, 120), Totals(1, 40), Totals(2, 80),
    )  # fmt: skip
    taken = await b.take(SessionKey("", "s"), 7)
    assert taken is not None
    assert await a.parked_totals() == Totals(1, 40)
    await b.write([replace(taken, row=np.zeros(20, np.float32), owner="")])
    assert (await a.totals(), await a.parked_totals()) == (Totals(3, 160), Totals(2, 120))
    await a.erase({SessionKey("", "t"): 7, SessionKey("x", "u"): 7}, scrub=True)
    assert (await a.totals(), await a.totals("x"), await a.parked_totals()) == (
        Totals(1, 80), Totals(0, 0), Totals(1, 80),
    )  # fmt: skip


async def test_the_longest_parked_are_those_of_no_living_owner(open_: Open) -> None:
    store = await open_("a")
    await store.write(
        [
            new("newest", used_s=5.0), new("old", used_s=2.0), new("live", used_s=1.0, owner="a"),
            new("orphan", used_s=3.0, owner="dead"), new("other", used_s=0.5, key=SessionKey("x", "other")),
        ]
    )  # fmt: skip
    assert ids(await store.longest_parked(9)) == ["other", "old", "orphan", "newest"]
    assert ids(await store.longest_parked(2, tenant="")) == ["old", "orphan"]
    assert ids(await store.longest_parked(9, used_before_s=3.0)) == ["other", "old"]


async def test_a_closed_store_says_so(open_: Open) -> None:
    store = await open_("a")
    await store.close()
    if isinstance(store, SharedSqliteStore):
        with pytest.raises(StoreError):
            await store.probe()


# Redis's own


def redis_store(server: RedisServer, timeout_s: float = 1.0, ttl_s: float = 60.0) -> RedisStore:
    return RedisStore(server.url, prefix="test:", ttl_s=ttl_s, timeout_s=timeout_s)


async def opened(store: RedisStore) -> RedisStore:
    await store.open("a", lambda wanted: None)
    await store.renew(LEASE_S)
    return store


async def test_redis_killed_and_started_again_has_all_that_it_confirmed(redis: RedisServer, tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        store = await opened(redis_store(server))
        await store.write([new("s")])
        server.kill()
        with pytest.raises(StoreError, match=str(server.port)):
            await store.read(SessionKey("", "s"))
        server.start()
        found = await store.read(SessionKey("", "s"))
        assert content(found) == content(of(new("s")))
        await store.close()


async def test_redis_that_does_not_answer_holds_nobody_up_for_longer_than_its_time(
    redis: RedisServer, tmp_path: Path
) -> None:
    with redis_server(tmp_path) as server:
        store = await opened(redis_store(server, timeout_s=0.2))
        server.pause()
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(StoreError):
                await store.probe()
        server.go_on()
        await store.probe()
        await store.close()


async def test_a_write_that_comes_late_changes_nothing(redis: RedisServer, tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        store = await opened(redis_store(server))
        await store.write([new("s")])
        late = store._written(replace(record("s"), fence=7, next_step=10))
        await store.write([replace(record("s"), fence=7, next_step=11)])
        await store._write(args=late)
        found = await store.read(SessionKey("", "s"))
        assert found is not None
        assert found.next_step == 11
        await store.close()


async def test_a_redis_that_may_evict_is_refused(redis: RedisServer, tmp_path: Path) -> None:
    with redis_server(tmp_path, **{"maxmemory-policy": "allkeys-lru"}) as server:
        store = redis_store(server)
        with pytest.raises(StoreError, match="allkeys-lru"):
            await store.open("a", lambda wanted: None)
        await store._client.aclose()


async def test_a_password_is_in_no_error(redis: RedisServer, tmp_path: Path) -> None:
    with redis_server(tmp_path, requirepass="correct-secret") as server:
        await (await opened(redis_store(server))).close()
        wrong = RedisStore(server.url.replace("correct", "wrong"), prefix="", ttl_s=1.0, timeout_s=1.0)
        with pytest.raises(StoreError) as refusal:
            await wrong.open("a", lambda wanted: None)
        assert "secret" not in str(refusal.value)
        await wrong._client.aclose()


async def test_a_parked_session_vanishes_from_redis_after_its_time_and_a_live_one_does_not(
    redis: RedisServer, tmp_path: Path
) -> None:
    with redis_server(tmp_path) as server:
        store = await opened(redis_store(server, ttl_s=0.1))
        await store.write([new("parked"), new("live", owner="a")])

        async def vanished() -> bool:
            return ids(await store.after(SessionKey("", ""), 9)) == ["live"]

        await until(vanished)
        assert (await store.totals()).sessions == 1
        assert await store.parked_totals() == Totals(0, 0)
        await store.close()
