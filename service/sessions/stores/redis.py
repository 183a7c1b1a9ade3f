"""Redis as a store that the services of several machines share."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import msgpack
import redis.asyncio as redis_client
from redis.exceptions import RedisError, ResponseError

from models.manifest import ModelKey
from service.sessions.record import SessionKey, SessionRecord, SessionSummary
from service.sessions.stores import redis_scripts as scripts
from service.sessions.stores.record_codec import decode_record, encode_record
from service.sessions.stores.shared import StoredSession, Totals, Wanted
from service.sessions.stores.store import CLOSE_TIMEOUT_S, StoreError

log = logging.getLogger(__name__)

Result = TypeVar("Result")
LISTEN_AGAIN_S = 0.2
LOOK_UP_S = 1.0
SCRUB_TIMEOUT_S = 60.0
WALK = 500  # members at a time


class RedisStore:
    """See SharedStore. One Redis, no cluster; what it is set to decides what survives its own death: docs/redis.md.

    A scrub rewrites the append-only file; snapshots and replicas that were made before it keep what was erased.
    """

    durable = True

    def __init__(self, url: str, *, prefix: str, ttl_s: float, timeout_s: float) -> None:
        """A parked session vanishes `ttl_s` after it was written last, even if no service runs. Raises ValueError."""
        self._prefix = prefix
        self._ttl_ms = round(ttl_s * 1_000)
        self._client = redis_client.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, health_check_interval=10
        )
        given = self._client.connection_pool.connection_kwargs
        self._address = f"{given.get('host', 'localhost')}:{given.get('port', 6379)}"  # never the password
        register = self._client.register_script
        self._write, self._take = register(scripts.WRITE), register(scripts.TAKE)
        self._erase, self._forget = register(scripts.ERASE), register(scripts.FORGET)
        self._renew = register(scripts.RENEW)
        self._listening: asyncio.Task[None] | None = None
        self._scrubs_ended = False
        self._closed = False
        self._numbers = itertools.count()  # of writes

    async def open(self, owner: str, on_wanted: Callable[[Wanted], None]) -> None:
        self._owner = owner
        await self._do(self._client.ping())
        await self._check_settings()
        self._listening = asyncio.create_task(self._listen(on_wanted))

    async def renew(self, lease_s: float) -> bool:
        return bool(await self._do(self._renew(args=[self._prefix, self._owner, round(lease_s * 1_000)])))

    async def bury(self, owners: Iterable[str]) -> None:
        keys = [f"{self._prefix}lease:{owner}" for owner in owners]
        if keys:
            await self._do(self._client.delete(*keys))

    async def write(self, records: Sequence[SessionRecord]) -> frozenset[SessionKey]:
        written = await self._in_one_go((self._write, self._written(record)) for record in records)
        return frozenset(record.key for record, done in zip(records, written, strict=True) if not done)

    async def read(self, key: SessionKey) -> SessionRecord | None:
        return _record_from(await self._do(self._client.hmget(self._session(key), "record", "fence", "owner")))

    async def take(self, key: SessionKey, fence: int) -> SessionRecord | None:
        return _record_from(await self._do(self._take(args=[*self._named(key), fence, self._owner])))

    async def erase(self, fences: Mapping[SessionKey, int], *, scrub: bool = False) -> None:
        await self._in_one_go((self._erase, [*self._named(key), fence]) for key, fence in fences.items())
        if scrub:
            await self._scrub()

    async def want(self, owner: str, wanted: Wanted) -> None:
        channel, text = f"{self._prefix}wanted:{owner}", msgpack.packb((*wanted.key, wanted.deleted))
        await self._do(self._client.publish(channel, text))

    async def find(self, key: SessionKey) -> StoredSession | None:
        return next(iter(await self._stored([_member(key)])), None)

    async def after(self, key: SessionKey, sessions: int) -> list[StoredSession]:
        found: list[StoredSession] = []
        start = b"(" + _member(key)
        while len(found) < sessions:
            command = self._client.zrangebylex(
                f"{self._prefix}ids", start, b"(" + key.tenant.encode() + b"\1", 0, sessions
            )
            members: list[bytes] = await self._do(command)
            if not members:
                break
            found += await self._stored(members)
            start = b"(" + members[-1]
        return found[:sessions]

    async def totals(self, tenant: str | None = None) -> Totals:
        if tenant is None:
            count = await self._do(self._client.zcard(f"{self._prefix}ids"))
            return Totals(count, sum(map(int, await self._do(self._client.hvals(f"{self._prefix}bytes")))))
        low, high = b"[" + tenant.encode() + b"\0", b"(" + tenant.encode() + b"\1"
        count = await self._do(self._client.zlexcount(f"{self._prefix}ids", low, high))
        return Totals(count, int(await self._do(self._client.hget(f"{self._prefix}bytes", tenant)) or 0))

    async def parked_totals(self) -> Totals:
        count = await self._do(self._client.zcard(f"{self._prefix}parked"))
        return Totals(count, int(await self._do(self._client.get(f"{self._prefix}parked_bytes")) or 0))

    async def longest_parked(
        self, sessions: int, *, tenant: str | None = None, used_before_s: float | None = None
    ) -> list[StoredSession]:
        def wanted(stored: StoredSession) -> bool:
            summary = stored.summary
            return tenant in (None, summary.key.tenant) and (used_before_s is None or summary.used_s < used_before_s)

        found = [stored for stored in await self._of_the_dead() if wanted(stored)]
        start = 0
        highest = "+inf" if used_before_s is None else f"({used_before_s}"
        while len(found) < sessions:
            command = self._client.zrangebyscore(f"{self._prefix}parked", "-inf", highest, start, WALK)
            members: list[bytes] = await self._do(command)
            if not members:
                break
            start += len(members)
            found += [stored for stored in await self._stored(members) if wanted(stored)]
        return sorted(found, key=lambda stored: stored.summary.used_s)[:sessions]

    async def probe(self) -> None:
        await self._do(self._client.set(f"{self._prefix}probe", ""))

    def end_scrubs(self) -> None:
        self._scrubs_ended = True

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        self._closed = True
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening], timeout=LOOK_UP_S + LISTEN_AGAIN_S)
        with suppress(StoreError, TimeoutError):  # then the lease runs out by itself
            async with asyncio.timeout(timeout_s):
                await self.bury([self._owner])
        await self._client.aclose()

    async def _check_settings(self) -> None:
        """Raises StoreError where sessions may be evicted; other settings only weaken what survives its own death."""
        try:
            given = await self._do(self._client.config_get("maxmemory-policy", "appendonly", "appendfsync"))
        except StoreError as error:
            if not isinstance(error.__cause__, ResponseError):
                raise
            log.warning("the settings of Redis at %s cannot be read; see docs/redis.md", self._address)
            return
        settings = {_text(name): _text(value) for name, value in given.items()}
        if (policy := settings.get("maxmemory-policy")) != "noeviction":
            raise StoreError(f"Redis at {self._address} has the maxmemory-policy {policy}, and so may drop sessions")
        if (settings.get("appendonly"), settings.get("appendfsync")) != ("yes", "always"):
            log.warning("Redis at %s may forget what it has confirmed when it dies; see docs/redis.md", self._address)

    async def _scrub(self) -> None:
        if self._scrubs_ended:
            raise StoreError("the service ends soon: the append-only file keeps old bytes")
        if _text(dict(await self._do(self._client.config_get("appendonly"))).get("appendonly", "no")) != "yes":
            return
        with suppress(StoreError):  # one is under way, and another is scheduled
            await self._do(self._client.bgrewriteaof())
        try:
            async with asyncio.timeout(SCRUB_TIMEOUT_S):
                while await self._rewrites():  # noqa: ASYNC110 - of which Redis gives no notice
                    await asyncio.sleep(LISTEN_AGAIN_S)
        except TimeoutError:
            raise StoreError(f"Redis at {self._address} does not end its rewrite") from None

    async def _rewrites(self) -> bool:
        state = await self._do(self._client.info("persistence"))
        return bool(state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])

    async def _listen(self, on_wanted: Callable[[Wanted], None]) -> None:
        while not self._closed:  # the client of Redis may swallow a cancellation
            with suppress(RedisError, OSError):
                async with self._client.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(f"{self._prefix}wanted:{self._owner}")
                    while not self._closed:
                        if message := await channel.get_message(timeout=LOOK_UP_S):
                            tenant, session_id, deleted = msgpack.unpackb(message["data"])
                            on_wanted(Wanted(SessionKey(tenant, session_id), deleted))
            await asyncio.sleep(LISTEN_AGAIN_S)

    async def _of_the_dead(self) -> list[StoredSession]:
        """Sessions whose owners' leases have run out, of all owners that were ever seen with one."""
        owners: list[bytes] = list(await self._do(self._client.smembers(f"{self._prefix}owners")))
        found: list[StoredSession] = []
        for owner in owners:
            if await self._do(self._client.exists(f"{self._prefix}lease:{_text(owner)}")):
                continue
            members: list[bytes] = list(await self._do(self._client.smembers(f"{self._prefix}of:{_text(owner)}")))
            if not members:
                await self._do(self._client.srem(f"{self._prefix}owners", owner))
            found += await self._stored(members)
        return found

    async def _stored(self, members: Sequence[bytes]) -> list[StoredSession]:
        """Of those that are there; the others leave the indexes."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for member in members:
                pipeline.hmget(f"{self._prefix}session:".encode() + member, "summary", "fence", "owner")
            rows = await self._do(pipeline.execute())
        owners = sorted({_text(owner) for summary, _, owner in rows if summary is not None and owner})
        async with self._client.pipeline(transaction=False) as pipeline:
            for owner in owners:
                pipeline.exists(f"{self._prefix}lease:{owner}")
            lives = dict(zip(owners, await self._do(pipeline.execute()), strict=True))
        for member, (summary, *_) in zip(members, rows, strict=True):
            if summary is None:
                await self._do(self._forget(args=[self._prefix, member, member.partition(b"\0")[0]]))
        return [
            StoredSession(_summary_from(summary), int(fence), _text(owner), bool(lives.get(_text(owner))))
            for summary, fence, owner in rows
            if summary is not None
        ]

    def _session(self, key: SessionKey) -> bytes:
        return f"{self._prefix}session:".encode() + _member(key)

    def _named(self, key: SessionKey) -> list[Any]:
        return [self._prefix, _member(key), key.tenant]

    def _written(self, record: SessionRecord) -> list[Any]:
        size_bytes, new = record.size_bytes, int(record.is_new)
        summary = (record.key, record.model, record.next_step, record.opened_s, record.used_s, size_bytes)
        return [
            *self._named(record.key),
            record.fence,
            record.owner,
            new,
            record.used_s,
            size_bytes,
            self._ttl_ms,
            msgpack.packb(summary),
            encode_record(record),
            self._owner,
            next(self._numbers),
        ]

    async def _in_one_go(self, calls: Iterable[tuple[Any, list[Any]]]) -> list[Any]:
        """One script for each, sent together."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for script, arguments in calls:
                await script(args=arguments, client=pipeline)
            return list(await self._do(pipeline.execute()))

    async def _do(self, command: Awaitable[Result] | Any) -> Any:
        with self._explained():
            return await command

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise StoreError(f"Redis at {self._address} failed: {error}") from error


def _summary_from(value: bytes) -> SessionSummary:
    key, model, *others = msgpack.unpackb(value)
    return SessionSummary(SessionKey(*key), ModelKey(*model), *others)


def _member(key: SessionKey) -> bytes:
    return f"{key.tenant}\0{key.session_id}".encode()


def _record_from(found: Sequence[bytes] | None) -> SessionRecord | None:
    """Of record, fence and owner, which are all there or none. Raises RecordUnreadable."""
    if found is None or found[0] is None:
        return None
    record, fence, owner = found
    return replace(decode_record(record), fence=int(fence), owner=_text(owner))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
