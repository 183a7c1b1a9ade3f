"""Keeps records in one Redis server, which several machines share."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import msgpack
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from models.manifest import ModelKey, model_key
from service.sessions.record import SessionKey, SessionRecord, SessionSummary
from service.sessions.stores import redis_scripts
from service.sessions.stores.record_codec import decode_record, encode_record
from service.sessions.stores.redis_wants import RedisWants
from service.sessions.stores.shared import StoredSession, Totals, Wanted
from service.sessions.stores.store import CLOSE_TIMEOUT_S, RecordUnreadable, StoreError

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32  # one more waits for one of these
PAGE_SESSIONS = 500  # looked at in one script, for Redis does nothing else meanwhile
PIPELINE_SESSIONS = 50  # sent together; the event loop packs so many in a few milliseconds
SCRUB_TIMEOUT_S = 300.0
SCRUB_POLL_S = 0.05


class RedisStore:
    """See SharedStore. For one Redis server of version 7 or newer, not for a cluster; docs/redis.md says how to set it.

    A parked session vanishes by itself after `ttl_s`, which is longer than any may be parked. A batch is
    written record by record, each of them wholly or not at all. Scrubbing rewrites the append-only file; snapshots,
    backups and replicas keep what they have.
    """

    durable = True

    def __init__(self, url: str, *, prefix: str, ttl_s: float, timeout_s: float = 5.0) -> None:
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=timeout_s,
                protocol=2,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),  # a write that is sent again could take effect late
            )
        except ValueError:  # whose text may have a part of the password
            raise StoreError("redis_url: must be redis://[:password@]host:port/db, or rediss:// for TLS") from None
        self._redis = Redis(connection_pool=pool)
        given = pool.connection_kwargs
        self._name = f"the session store redis at {given.get('host', 'localhost')}:{given.get('port', 6379)}"
        self._secrets = [str(given[name]) for name in ("password", "username") if given.get(name)]
        self._prefix = prefix
        self._ttl_ms = _milliseconds(ttl_s)
        self._timeout_s = timeout_s
        self._owner = ""
        self._wants = RedisWants(self._redis, f"{prefix}wanted:", timeout_s)
        self._turn = asyncio.Lock()
        self._connection_number = 0
        self._in_order = False  # nothing that was sent can still arrive
        self._scrubs_ended = asyncio.Event()
        self._closed = False

    async def open(self, owner: str, on_wanted: Callable[[Wanted], None]) -> None:
        self._owner = owner
        async with self._explained():
            await self._check_settings()
            await self._wants.open(owner, on_wanted)
        await self.probe()

    async def renew(self, lease_s: float) -> bool:
        async with self._explained(), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.set(self._key("owner", self._owner), 1, px=_milliseconds(lease_s), get=True)
            pipeline.pexpire(self._key("connection", self._owner), self._ttl_ms)
            had_lived, _ = await pipeline.execute()
            return had_lived is not None

    async def bury(self, owners: Iterable[str]) -> None:
        if dead := [self._key("owner", owner) for owner in owners]:
            async with self._explained():
                await self._redis.delete(*dead)

    async def write(self, records: Sequence[SessionRecord]) -> frozenset[SessionKey]:
        calls = [(record.key, record.fence, self._written(record)) for record in records]
        replies = await self._change(redis_scripts.WRITE, calls)
        return frozenset(record.key for record, written in zip(records, replies, strict=True) if not written)

    async def read(self, key: SessionKey) -> SessionRecord | None:
        async with self._explained():
            found = await _reply(self._redis.hmget(self._session(key), ["record", "fence", "owner"]))
        return _record_from(found) if found[0] is not None else None

    async def take(self, key: SessionKey, fence: int) -> SessionRecord | None:
        more = (self._owner, self._key("owner", ""))
        (found,) = await self._change(redis_scripts.TAKE, [(key, fence, more)])
        return _record_from(found) if found else None

    async def erase(self, fences: Mapping[SessionKey, int], *, scrub: bool = False) -> None:
        await self._change(redis_scripts.ERASE, [(key, fence, ()) for key, fence in fences.items()])
        if scrub:
            async with self._explained(SCRUB_TIMEOUT_S):
                await self._scrub()

    async def want(self, owner: str, wanted: Wanted) -> None:
        async with self._explained():
            await self._wants.tell(owner, wanted)

    async def find(self, key: SessionKey) -> StoredSession | None:
        async with self._explained():
            return (await self._find([key]))[0]

    async def after(self, key: SessionKey, sessions: int) -> list[StoredSession]:
        ids = self._key("ids", key.tenant)
        found: list[StoredSession] = []
        while (missing := sessions - len(found)) > 0:
            async with self._explained():
                page = await _reply(self._redis.zrangebylex(ids, b"(" + key.session_id.encode(), b"+", 0, missing))
                keys = [SessionKey(key.tenant, session_id.decode()) for session_id in page]
                stored = await self._find(keys)
            await self._forget_lost(keys, stored)
            found += [session for session in stored if session]
            if len(keys) < missing:
                break
            key = keys[-1]
        return found

    async def longest_parked(
        self, sessions: int, *, tenant: str | None = None, used_before_s: float | None = None
    ) -> list[StoredSession]:
        used = self._key("used") if tenant is None else self._key("used", tenant)
        end = "+inf" if used_before_s is None else f"({used_before_s!r}"
        found: list[StoredSession] = []
        looked_at = 0
        while len(found) < sessions:
            async with self._explained():
                page = await _reply(self._redis.zrangebyscore(used, "-inf", end, looked_at, PAGE_SESSIONS))
                keys = [_key_from(name) for name in page]
                stored = await self._find(keys)
            await self._forget_lost(keys, stored)
            found += [session for session in stored if session and not session.owner_lives]
            if len(keys) < PAGE_SESSIONS:
                break
            looked_at += sum(session is not None for session in stored)
        return found[:sessions]

    async def totals(self, tenant: str | None = None) -> Totals:
        key = self._key("totals") if tenant is None else self._key("totals", tenant)
        async with self._explained():
            found = await _reply(self._redis.hmget(key, ["sessions", "size_bytes"]))
        return Totals(*(int(value or 0) for value in found))

    async def parked_totals(self) -> dict[ModelKey, Totals]:
        async with self._explained():
            found = await _reply(self._redis.hgetall(self._key("parked")))
        models = [field.partition(b":")[2] for field in found if field.startswith(b"sessions:")]
        return {
            _model_from(model): Totals(int(found[b"sessions:" + model]), int(found[b"size_bytes:" + model]))
            for model in models
        }

    async def probe(self) -> None:
        async with self._explained(), self._turn:
            await self._begin_connection()

    def end_scrubs(self) -> None:
        self._scrubs_ended.set()

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        if self._closed:
            return
        with suppress(StoreError, TimeoutError):  # then the lease runs out by itself
            async with asyncio.timeout(timeout_s):
                await self.bury([self._owner])
        self._closed = True
        await self._wants.close()
        await self._redis.aclose()

    async def _change(self, script: str, calls: Sequence[tuple[SessionKey, int, tuple[Any, ...]]]) -> list[Any]:
        """Run the script for each, in the order of the calls of this method."""
        if not calls:
            return []
        async with self._explained(), self._turn:
            if not self._in_order:
                await self._begin_connection()
            self._in_order = False
            replies: list[Any] = []
            for start in range(0, len(calls), PIPELINE_SESSIONS):
                replies += await self._run(script, calls[start : start + PIPELINE_SESSIONS])
            self._in_order = True
            return replies

    async def _begin_connection(self) -> None:
        """What was sent before, and has not arrived yet, is refused from now on."""
        self._in_order = False
        self._connection_number += 1
        await self._redis.set(self._key("connection", self._owner), self._connection_number, px=self._ttl_ms)
        self._in_order = True

    async def _run(self, script: str, calls: Sequence[tuple[SessionKey, int, tuple[Any, ...]]]) -> list[Any]:
        digest = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.script_load(script)  # each time, for Redis may have been started again
            for key, fence, more in calls:
                keys = self._keys(key)
                arguments = (_name_of(key), key.session_id.encode(), self._connection_number, fence, *more)
                pipeline.evalsha(digest, len(keys), *keys, *arguments)
            _, *replies = await pipeline.execute(raise_on_error=False)  # for that error would tell whole commands
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        return replies

    async def _find(self, keys: Sequence[SessionKey]) -> list[StoredSession | None]:
        sessions = [self._session(key) for key in keys]
        found = await _reply(self._redis.eval(redis_scripts.FIND, len(sessions), *sessions, self._key("owner", "")))
        return [_stored(key, *values) if values else None for key, values in zip(keys, found, strict=True)]

    async def _forget_lost(self, keys: Sequence[SessionKey], stored: Sequence[StoredSession | None]) -> None:
        """Those whose time has run out are in the indexes still, and in the totals."""
        lost = [key for key, session in zip(keys, stored, strict=True) if session is None]
        await self._change(redis_scripts.ERASE, [(key, -1, ()) for key in lost])

    async def _scrub(self) -> None:
        if not (await self._persistence())["aof_enabled"]:
            return
        await self._end_of_rewrite()  # that may have read the session
        await self._redis.bgrewriteaof()
        if (await self._end_of_rewrite())["aof_last_bgrewrite_status"] != "ok":
            raise StoreError(f"{self._name} could not rewrite its append-only file, which keeps old bytes")

    async def _end_of_rewrite(self) -> dict[str, Any]:
        while not self._scrubs_ended.is_set():
            state = await self._persistence()
            if not state["aof_rewrite_in_progress"] and not state["aof_rewrite_scheduled"]:
                return state
            with suppress(TimeoutError):
                async with asyncio.timeout(SCRUB_POLL_S):
                    await self._scrubs_ended.wait()
        raise StoreError(f"{self._name} scrubs no more, for this server ends: its append-only file keeps old bytes")

    async def _persistence(self) -> dict[str, Any]:
        return await self._redis.info("persistence")

    async def _check_settings(self) -> None:
        """Raises StoreError if Redis may drop sessions; warns if a crash may."""
        try:
            given = await self._redis.config_get("maxmemory-policy", "appendonly", "appendfsync")
        except ResponseError as error:
            log.warning("%s does not tell its settings, so that nobody knows what it promises: %s", self._name, error)
            return
        if given["maxmemory-policy"] != "noeviction":
            raise StoreError(
                f"{self._name} has maxmemory-policy {given['maxmemory-policy']}: it must be noeviction, for otherwise "
                "Redis drops sessions when its memory is full"
            )
        if given["appendonly"] != "yes":
            log.warning("%s has appendonly no: its crash or restart loses sessions that were durable", self._name)
        elif given["appendfsync"] != "always":
            log.warning(
                "%s has appendfsync %s: a loss of power loses the last durable steps", self._name, given["appendfsync"]
            )

    @asynccontextmanager
    async def _explained(self, timeout_s: float | None = None) -> AsyncIterator[None]:
        if self._closed:
            raise StoreError(f"{self._name} is closed")
        try:
            async with asyncio.timeout(timeout_s or self._timeout_s):
                yield
        except (RedisError, OSError) as error:  # a TimeoutError is an OSError
            raise StoreError(f"{self._name} failed: {self._reason(error)}") from None

    def _reason(self, error: Exception) -> str:
        if isinstance(error, AuthenticationError):
            return "it refuses the password"
        reason = str(error) or f"no answer within {self._timeout_s:g} s"
        for secret in self._secrets:
            reason = reason.replace(secret, "…")
        return reason

    def _written(self, record: SessionRecord) -> tuple[Any, ...]:
        r = record
        summary = msgpack.packb((*r.model, r.next_step, r.opened_s, r.used_s, r.size_bytes))
        model = f"{r.model.name}@{r.model.version}"
        return (int(r.is_new), r.owner, r.size_bytes, model, repr(r.used_s), self._ttl_ms, summary, encode_record(r))

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    def _session(self, key: SessionKey) -> bytes:
        return self._key("session", "").encode() + _name_of(key)

    def _keys(self, key: SessionKey) -> list[str | bytes]:
        """In the order that the scripts know."""
        return [
            self._session(key),
            self._key("ids", key.tenant),
            self._key("used"),
            self._key("used", key.tenant),
            self._key("counted"),
            self._key("totals"),
            self._key("totals", key.tenant),
            self._key("parked"),
            self._key("connection", self._owner),
        ]


def _name_of(key: SessionKey) -> bytes:
    """One name for both parts, whatever is in them."""
    tenant = key.tenant.encode()
    return b"%d:%s:%s" % (len(tenant), tenant, key.session_id.encode())


def _key_from(name: bytes) -> SessionKey:
    size, _, both = name.partition(b":")
    return SessionKey(both[: int(size)].decode(), both[int(size) + 1 :].decode())


def _model_from(name: bytes) -> ModelKey:
    """Of `speaker@1`."""
    model, _, version = name.decode().rpartition("@")
    return model_key(model, int(version))


def _record_from(found: Sequence[bytes]) -> SessionRecord:
    """Of record, fence and owner. Raises RecordUnreadable."""
    record, fence, owner = found
    return replace(decode_record(record), fence=int(fence), owner=owner.decode())


def _stored(key: SessionKey, summary: bytes, fence: bytes, owner: bytes, lives: int) -> StoredSession:
    try:
        name, version, *others = msgpack.unpackb(summary)
        described = SessionSummary(key, model_key(name, version), *others)
    except (TypeError, ValueError, msgpack.UnpackException) as error:
        raise RecordUnreadable(f"the summary of a stored session is damaged: {error}") from error
    return StoredSession(described, int(fence), owner.decode(), bool(lives))


async def _reply(command: Awaitable[Any] | Any) -> Any:
    """Its types say more than what it answers: bytes."""
    return await command


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1_000))
