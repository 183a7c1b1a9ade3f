"""What is Redis's own: crashes, outages, refusals, and sessions that run out by themselves."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from service.sessions.record import SessionKey
from service.sessions.stores.redis import RedisStore
from service.sessions.stores.shared import Totals, Wanted
from service.sessions.stores.store import RecordUnreadable, StoreError
from tests.support.redis_server import RedisServer, needs_redis, start_redis
from tests.unit.test_session_stores import content
from tests.unit.test_shared_stores import FENCE, TIMEOUT_S, ids, new, next_of

pytestmark = needs_redis
STORE_TIMEOUT_S = 0.5
TTL_S = 3_600.0
S = SessionKey("", "s")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with start_redis(tmp_path) as server:
        yield server


@pytest.fixture
async def store(redis: RedisServer) -> AsyncIterator[RedisStore]:
    store = made(redis.url)
    await store.open("a", lambda _: None)
    yield store
    await store.close(1.0)


def made(url: str, *, ttl_s: float = TTL_S) -> RedisStore:
    return RedisStore(url, prefix="test:", ttl_s=ttl_s, timeout_s=STORE_TIMEOUT_S)


async def until_gone(store: RedisStore, key: SessionKey) -> None:
    """Of an expiry, which tells no event."""
    async with asyncio.timeout(TIMEOUT_S):
        while await store.find(key):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# Crashes and outages


async def test_no_acknowledged_write_is_lost_when_redis_is_killed(redis: RedisServer, store: RedisStore) -> None:
    acknowledged = {}

    async def write_on(name: str) -> None:
        written = new(name)
        while True:
            await store.write([written])
            acknowledged[written.key] = written
            written = next_of(written)

    writing = [asyncio.create_task(write_on(name)) for name in "pqr"]
    while sum(r.next_step for r in acknowledged.values()) < 300:  # noqa: ASYNC110
        await asyncio.sleep(0)
    redis.kill()
    results = await asyncio.gather(*writing, return_exceptions=True)
    assert all(isinstance(result, StoreError) for result in results)
    redis.start()
    for key, written in acknowledged.items():
        found = await store.read(key)
        assert found is not None
        assert found.next_step in (written.next_step, written.next_step + 1)  # one may have been under way


async def test_while_redis_is_down_all_fails_soon_and_afterwards_it_works_again(
    redis: RedisServer, store: RedisStore
) -> None:
    await store.write([new("s")])
    await store.renew(60)
    redis.kill()
    for ask in (lambda: store.write([next_of(new("s"))]), lambda: store.read(S), store.probe, lambda: store.renew(1)):
        start_s = time.monotonic()
        with pytest.raises(StoreError, match=f"127.0.0.1:{redis.port}"):
            await ask()
        assert time.monotonic() - start_s < STORE_TIMEOUT_S * 2
    redis.start()
    assert await store.write([next_of(new("s"))]) == frozenset()
    assert await store.renew(60)


async def test_a_redis_that_stalls_is_a_timeout_and_the_newest_write_stays(
    redis: RedisServer, store: RedisStore
) -> None:
    await store.write([new("s")])
    redis.stall()
    start_s = time.monotonic()
    with pytest.raises(StoreError):
        await store.write([replace(next_of(new("s")), next_step=77)])
    with pytest.raises(StoreError):
        await store.erase({S: FENCE})
    assert time.monotonic() - start_s < STORE_TIMEOUT_S * 4
    redis.go_on()
    newest = replace(next_of(new("s")), next_step=78)
    assert await store.write([newest]) == frozenset()
    for _ in range(20):
        await store.probe()
    assert content(await store.read(S)) == content(newest)


async def test_what_an_earlier_connection_sent_is_refused(redis: RedisServer, store: RedisStore) -> None:
    await store.write([new("s")])
    Redis.from_url(redis.url).incr("test:connection:a")  # as a newer connection does
    with pytest.raises(StoreError, match="not the newest"):
        await store.write([next_of(new("s"))])
    assert content(await store.read(S)) == content(replace(new("s"), is_new=False))
    assert await store.write([next_of(new("s"))]) == frozenset()


async def test_the_subscription_comes_back_with_redis(redis: RedisServer) -> None:
    heard: asyncio.Queue[Wanted] = asyncio.Queue()
    store = made(redis.url)
    await store.open("b", heard.put_nowait)
    redis.kill()
    redis.start()
    async with asyncio.timeout(TIMEOUT_S):
        while heard.empty():
            with suppress(StoreError):  # once, of a connection that was lost meanwhile
                await store.want("b", Wanted(S, deleted=True))
            await asyncio.sleep(0.05)
    assert heard.get_nowait() == Wanted(S, deleted=True)
    await store.close()


async def test_the_event_loop_goes_on_while_redis_stalls(redis: RedisServer, store: RedisStore) -> None:
    redis.stall()
    reading = asyncio.create_task(store.read(S))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0.001)
        turns += 1
    redis.go_on()
    assert turns > 20
    with pytest.raises(StoreError):
        await reading


# Refusals


async def test_a_wrong_password_is_told_without_it(tmp_path: Path) -> None:
    with start_redis(tmp_path, requirepass="right") as redis:
        store = made(f"redis://:wrong-secret@127.0.0.1:{redis.port}/0")
        with pytest.raises(StoreError, match="refuses the password") as refused:
            await store.open("a", lambda _: None)
        assert "wrong-secret" not in repr(refused.value)
        await store.close()
        right = made(f"redis://:right@127.0.0.1:{redis.port}/0")
        await right.open("a", lambda _: None)
        redis.kill()
        with pytest.raises(StoreError) as down:
            await right.probe()
        assert ":right@" not in str(down.value)
        await right.close(1.0)


@pytest.mark.parametrize("url", ["redis://:se/cret@h:1/0", "redis://:secret@h:port/0", "http://:secret@h", "secret"])
def test_a_url_of_another_form_is_refused_without_telling_it(url: str) -> None:
    with pytest.raises(StoreError, match="redis_url: must be redis://") as refused:
        made(url)
    assert "cret" not in str(refused.value)
    assert refused.value.__suppress_context__


async def test_a_redis_that_may_drop_sessions_is_refused(tmp_path: Path) -> None:
    refusal = pytest.raises(StoreError, match="maxmemory-policy allkeys-lru: it must be noeviction")
    with start_redis(tmp_path, maxmemory_policy="allkeys-lru") as redis, refusal:
        await made(redis.url).open("a", lambda _: None)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"appendonly": "no"}, "appendonly no"),
        ({"appendfsync": "everysec"}, "appendfsync everysec"),
        ({"aclfile": "users.acl"}, "does not tell its settings"),
        ({}, ""),
    ],
)
async def test_what_a_crash_may_lose_is_warned_of(
    tmp_path: Path, settings: dict[str, str], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "users.acl").write_text("user default on nopass ~* &* +@all -config\n")
    with start_redis(tmp_path, **settings) as redis, caplog.at_level(logging.WARNING):
        store = made(redis.url)
        await store.open("a", lambda _: None)
        await store.close()
    assert [warning in told for told in caplog.messages] == ([True] if warning else [])


async def test_a_full_redis_refuses_a_write_and_keeps_what_it_has(redis: RedisServer, store: RedisStore) -> None:
    await store.write([new("s")])
    server = Redis.from_url(redis.url)
    server.config_set("maxmemory", 1)
    with pytest.raises(StoreError, match="memory"):
        await store.write([next_of(new("s"))])
    with pytest.raises(StoreError, match="memory"):
        await store.probe()
    server.config_set("maxmemory", 0)
    assert content(await store.read(S)) == content(replace(new("s"), is_new=False))
    assert await store.write([next_of(new("s"))]) == frozenset()


async def test_a_damaged_record_is_unreadable_and_the_others_are_well(redis: RedisServer, store: RedisStore) -> None:
    await store.write([new("s"), new("t")])
    Redis.from_url(redis.url).hset("test:session:0::s", "record", b"damaged")
    with pytest.raises(RecordUnreadable):
        await store.read(S)
    assert await store.read(SessionKey("", "t")) is not None


# Expiry and erasing


async def test_only_a_parked_session_has_a_time_to_live_and_each_write_gives_it_all_of_it(
    redis: RedisServer, store: RedisStore
) -> None:
    server, name = Redis.from_url(redis.url), "test:session:0::s"
    for change in (store.write([new("s")]), store.write([next_of(new("s"))])):
        if server.exists(name):
            server.expire(name, 10)
        await change
        assert TTL_S - 60 < server.ttl(name) <= TTL_S
    await store.take(S, FENCE)
    assert server.ttl(name) == -1  # for ever


async def test_what_has_run_out_leaves_pages_and_totals(redis: RedisServer, store: RedisStore) -> None:
    short = made(redis.url, ttl_s=0.2)
    await short.open("b", lambda _: None)
    await store.write([new("p", used_s=1), new("q", used_s=2)])
    await short.write([new("s", used_s=1.5), new("t", used_s=0.5)])
    await until_gone(store, S)
    await until_gone(store, SessionKey("", "t"))
    assert ids(await store.after(SessionKey("", "q"), 1)) == []
    assert ids(await store.longest_parked(1)) == ["p"]
    size = new("p").size_bytes
    assert await store.totals() == await store.totals("") == Totals(2, 2 * size)
    assert await store.parked_totals() == {new("p").model: Totals(2, 2 * size)}
    assert await store.write([new("s")]) == frozenset()  # its id is free again
    assert (await store.totals()).sessions == 3
    await short.close()


async def test_a_scrub_leaves_no_byte_in_any_file(redis: RedisServer, store: RedisStore, tmp_path: Path) -> None:
    await store.write([new("ID-MARK"), new("other")])
    await store.write([next_of(new("ID-MARK"))])
    await store.erase({SessionKey("", "ID-MARK"): FENCE})
    assert _occurrences(tmp_path, b"ID-MARK") > 0
    await store.erase({}, scrub=True)
    assert _occurrences(tmp_path, b"ID-MARK") == 0
    assert await store.read(SessionKey("", "other")) is not None


async def test_a_closed_store_refuses(store: RedisStore) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="is closed"):
        await store.read(S)


def _occurrences(folder: Path, pattern: bytes) -> int:
    return sum(path.read_bytes().count(pattern) for path in folder.rglob("*") if path.is_file())
