"""How one process tells another that it wants a session: a channel of Redis for each owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from service.sessions.record import SessionKey
from service.sessions.stores.shared import Wanted

log = logging.getLogger(__name__)

RECONNECT_S = 0.2


class RedisWants:
    """Listens in a task, and subscribes again when its connection is lost or silent for twice `timeout_s`."""

    def __init__(self, redis: Redis, prefix: str, timeout_s: float) -> None:
        self._redis = redis
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._closed = False
        self._listening: asyncio.Task[None] | None = None

    async def open(self, owner: str, on_wanted: Callable[[Wanted], None]) -> None:
        """Returns once Redis knows that this owner listens; cancelled, it does not."""
        subscribed = asyncio.Event()
        self._listening = asyncio.create_task(self._listen(self._prefix + owner, on_wanted, subscribed))
        try:
            await subscribed.wait()
        except BaseException:
            await self.close()
            raise

    async def tell(self, owner: str, wanted: Wanted) -> None:
        """Whoever is not there hears nothing. Raises RedisError, OSError."""
        await self._redis.publish(self._prefix + owner, msgpack.packb((*wanted.key, wanted.deleted)))

    async def close(self) -> None:
        """Hear no more."""
        self._closed = True  # the client of Redis may swallow the cancellation
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening], timeout=2 * self._timeout_s)
            self._listening = None

    async def _listen(self, channel: str, on_wanted: Callable[[Wanted], None], subscribed: asyncio.Event) -> None:
        while not self._closed:
            try:
                await self._subscribe(channel, on_wanted, subscribed)
            except (RedisError, OSError) as error:
                log.debug("the subscription to %s was lost: %s", channel, error)
            await asyncio.sleep(RECONNECT_S)

    async def _subscribe(self, channel: str, on_wanted: Callable[[Wanted], None], subscribed: asyncio.Event) -> None:
        """Until the connection is lost. Raises RedisError, OSError."""
        async with self._redis.pubsub() as subscription:
            await subscription.subscribe(channel)
            asked = False
            while not self._closed:
                message = await subscription.get_message(timeout=self._timeout_s)
                if message is None:
                    if asked:
                        raise RedisConnectionError("no answer")
                    await subscription.ping()
                asked = message is None
                if message and message["type"] == "subscribe":
                    subscribed.set()
                elif message and message["type"] == "message":
                    _hear(message["data"], on_wanted)


def _hear(data: Any, on_wanted: Callable[[Wanted], None]) -> None:
    try:
        tenant, session_id, deleted = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.UnpackException):  # not one of ours
        return
    on_wanted(Wanted(SessionKey(str(tenant), str(session_id)), bool(deleted)))
