"""Sessions of several processes over one store: each has one owner at a time, and nothing is lost between them."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest

from service.engine.step_engine import StepEngine
from service.errors import (
    Evicted,
    ServingError,
    SessionExists,
    SessionLimit,
    SessionMoved,
    SessionNotFound,
    StoreUnavailable,
)
from service.sessions.copies import SessionCopies
from service.sessions.limits import SessionLimits
from service.sessions.record import SessionKey, SessionRecord
from service.sessions.registry import Opening, SessionRegistry
from service.sessions.session import Session
from service.sessions.shared import Sharing
from service.sessions.stores.redis import RedisStore
from service.sessions.stores.shared_sqlite import SharedSqliteStore
from service.sessions.stores.store import StoreError
from tests.support.fakes import CountingMetrics, FakeExecutor, FakeStream, column
from tests.support.redis_server import RedisServer, needs_redis
from tests.unit.test_registry import MODEL, OTHER_TOKEN, TOKEN, described, named, opening

Store: TypeAlias = SharedSqliteStore | RedisStore

LEASE_S = 30.0
SHORT_LEASE_S = 0.3
TIMEOUT_S = 10.0


class Process:
    """A registry with its own connection to the store, as each process has one."""

    def __init__(self, registry: SessionRegistry, store: Store, metrics: CountingMetrics) -> None:
        self.registry = registry
        self.store = store
        self.metrics = metrics
        self.running = asyncio.create_task(registry.run())

    async def open(self, wanted: Opening) -> tuple[Session, FakeStream]:
        stream = FakeStream()
        session, _ = await self.registry.open(wanted, described(), stream)
        return session, stream

    async def step(self, session: Session, stream: FakeStream, *values: float) -> float:
        applied = await session.apply(stream, session.next_step, column(*values))
        self.registry.changed(session, len(values))
        return float(applied.outputs[-1, 0])

    async def begin(self, session_id: str, *values: float) -> tuple[Session, FakeStream]:
        session, stream = await self.open(opening(session_id))
        await self.step(session, stream, *values)
        return session, stream

    async def park(self, session_id: str, *values: float) -> None:
        session, stream = await self.begin(session_id, *values)
        self.registry.leave(session, stream)
        await self.registry.checkpoints.write_changed()

    def pause(self) -> None:
        """It renews its lease no more, nor writes, nor hears that somebody wants something."""
        self.running.cancel()
        if isinstance(self.store, RedisStore):
            assert self.store._wants._listening is not None
            self.store._wants._closed = True
            self.store._wants._listening.cancel()
        else:
            self.store._wants.close()


class Machine:
    """Starts processes over one store."""

    def __init__(self, make_store: Callable[[], Store], engine: StepEngine, stack: AsyncExitStack) -> None:
        self._make_store = make_store
        self._engine = engine
        self._stack = stack
        self.now_s = 1_000.0

    async def start(self, owner: str, *, lease_s: float = LEASE_S, **limits: float) -> Process:
        given = {
            "max_streams": 10, "max_sessions": 10, "max_sessions_per_tenant": 0, "max_parked_bytes": 0,
            "max_held_bytes": 10_000, "resume_window_s": 100.0, "idle_timeout_s": 0.0, "max_age_s": 0.0,
        } | limits  # fmt: skip
        store, metrics = self._make_store(), CountingMetrics()
        registry = SessionRegistry(
            self._engine,
            store,
            {MODEL: described()},
            SessionLimits(**given),  # type: ignore[arg-type]
            checkpoint_interval_s=60.0,
            checkpoint_steps=0,
            store_timeout_s=TIMEOUT_S,
            metrics=metrics,
            sharing=Sharing(owner, lease_s),
            clock=lambda: self.now_s,
        )
        await registry.start()
        process = Process(registry, store, metrics)
        self._stack.push_async_callback(registry.stop, 1.0)
        self._stack.callback(process.running.cancel)
        return process


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
async def machine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Machine]:
    engine = StepEngine({MODEL: FakeExecutor()}, max_tick_sessions=4, metrics=CountingMetrics())
    async with AsyncExitStack() as stack:
        if request.param == "sqlite":
            make_store: Callable[[], Store] = partial(SharedSqliteStore, tmp_path / "sessions.sqlite")
        else:
            redis: RedisServer = request.getfixturevalue("redis")
            make_store = partial(RedisStore, redis.url, prefix=f"{uuid.uuid4()}:", ttl_s=60.0, timeout_s=TIMEOUT_S)
        yield Machine(make_store, engine, stack)
    engine.close()


async def until_lost(stream: FakeStream) -> ServingError:
    async with asyncio.timeout(TIMEOUT_S):
        await stream.is_lost.wait()
    assert stream.lost is not None
    return stream.lost


async def test_a_session_that_one_process_parked_goes_on_in_another(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    await a.park("s", 1, 2)
    session, stream = await b.open(opening("s", resume=True))
    assert await b.step(session, stream, 3) == 6.0


async def test_a_live_session_changes_hands_with_every_step_that_was_applied(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    _, former = await a.begin("s", 1, 2)  # of which nothing is written yet
    session, stream = await b.open(opening("s", resume=True))
    assert await b.step(session, stream, 3) == 6.0
    assert isinstance(await until_lost(former), SessionMoved)


async def test_whoever_gives_up_while_a_session_is_taken_leaves_it_to_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = await machine.start("a"), await machine.start("b"), await machine.start("c")
    await a.park("s", 1, 2)
    take, is_asked, may_go_on = b.store.take, asyncio.Event(), asyncio.Event()

    async def slow_take(key: SessionKey, fence: int) -> SessionRecord | None:
        taken = await take(key, fence)
        is_asked.set()
        await may_go_on.wait()
        return taken

    monkeypatch.setattr(b.store, "take", slow_take)
    given_up = asyncio.create_task(b.open(opening("s", resume=True)))
    await is_asked.wait()
    given_up.cancel()
    may_go_on.set()
    async with asyncio.timeout(TIMEOUT_S):
        session, stream = await c.open(opening("s", resume=True))
    assert await c.step(session, stream, 3) == 6.0


async def test_two_streams_that_want_a_parked_session_at_once_leave_it_writable(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    await a.park("s", 1, 2)
    await asyncio.gather(*(b.open(opening("s", resume=True)) for _ in range(4)))
    session, stream = await b.open(opening("s", resume=True))
    await b.step(session, stream, 3)
    await b.registry.checkpoints.write_changed()
    assert stream.lost is None
    record = await b.store.read(named("s"))
    assert record is not None
    assert record.row.tolist() == [6.0]


async def test_without_its_token_a_session_of_another_process_is_not_even_asked_for(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    session, stream = await a.begin("s", 1)
    with pytest.raises(SessionExists):
        await b.open(opening("s", OTHER_TOKEN))
    assert stream.lost is None
    assert await a.step(session, stream, 2) == 3.0


async def test_of_two_that_begin_a_session_of_one_id_at_once_one_has_it(machine: Machine) -> None:
    processes = [await machine.start(name) for name in "abc"]
    opened = await asyncio.gather(
        *(process.open(opening("s", bytes([n]) * 16)) for n, process in enumerate(processes)), return_exceptions=True
    )
    kept = [pair for pair in opened if not isinstance(pair, BaseException) and pair[1].lost is None]
    assert len(kept) == 1


async def test_a_paused_process_makes_nothing_durable_once_another_has_the_session(machine: Machine) -> None:
    a, b = await machine.start("a", lease_s=SHORT_LEASE_S), await machine.start("b", lease_s=SHORT_LEASE_S)
    session, former = await a.begin("s", 1)
    await a.registry.checkpoints.write_changed()
    a.pause()
    taken, stream = await b.open(opening("s", resume=True))
    await b.step(taken, stream, 10)
    await a.step(session, former, 100)
    await a.registry.checkpoints.write_changed()
    assert isinstance(former.lost, SessionMoved)
    await b.registry.checkpoints.write_changed()
    record = await b.store.read(named("s"))
    assert record is not None
    assert record.row.tolist() == [11.0]


async def test_after_a_pause_past_the_lease_nothing_is_answered_before_it_is_known_whose_the_sessions_are(
    machine: Machine,
) -> None:
    a, b = await machine.start("a", lease_s=SHORT_LEASE_S), await machine.start("b", lease_s=SHORT_LEASE_S)
    _, lost = await a.begin("taken", 1)
    kept, stream = await a.begin("kept", 2)
    await a.registry.checkpoints.write_changed()
    a.pause()
    await b.open(opening("taken", resume=True))
    answering = asyncio.create_task(a.registry.may_answer())
    await asyncio.sleep(0)
    assert not answering.done()
    a.running = asyncio.create_task(a.registry.run())  # it wakes up
    async with asyncio.timeout(TIMEOUT_S):
        await answering
    assert isinstance(lost.lost, SessionMoved)
    assert await a.step(kept, stream, 3) == 5.0
    a.running.cancel()


async def test_a_session_is_lost_once_also_where_a_write_hears_of_it_before_whoever_asks(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await machine.start("a", lease_s=SHORT_LEASE_S), await machine.start("b", lease_s=SHORT_LEASE_S)
    session, former = await a.begin("s", 1)
    await a.registry.checkpoints.write_changed()
    a.pause()
    await b.open(opening("s", resume=True))
    await a.step(session, former, 2)
    take = a.store.take

    async def take_behind_a_write(key: SessionKey, fence: int) -> SessionRecord | None:
        monkeypatch.undo()
        await a.registry.checkpoints.write_changed()
        return await take(key, fence)

    monkeypatch.setattr(a.store, "take", take_behind_a_write)
    a.running = asyncio.create_task(a.registry.run())  # it wakes up
    async with asyncio.timeout(TIMEOUT_S):
        await a.registry.may_answer()
    assert isinstance(former.lost, SessionMoved)
    assert not a.running.done()
    a.running.cancel()


async def test_an_open_after_a_pause_finds_the_session_where_it_is_now(machine: Machine) -> None:
    a, b = await machine.start("a", lease_s=SHORT_LEASE_S), await machine.start("b", lease_s=SHORT_LEASE_S)
    await a.begin("s", 1)
    await a.registry.checkpoints.write_changed()
    a.pause()
    session, stream = await b.open(opening("s", resume=True))
    await b.step(session, stream, 2)
    b.registry.leave(session, stream)
    await b.registry.checkpoints.write_changed()
    opening_again = asyncio.create_task(a.open(opening("s", resume=True)))
    await asyncio.sleep(0)
    a.running = asyncio.create_task(a.registry.run())  # it wakes up
    async with asyncio.timeout(TIMEOUT_S):
        session, stream = await opening_again
    assert await a.step(session, stream, 3) == 6.0
    a.running.cancel()


async def test_what_a_dead_process_had_is_taken_at_once_when_it_is_buried(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    await a.begin("s", 1)
    await a.registry.checkpoints.write_changed()
    a.pause()
    await b.store.bury(["a"])
    async with asyncio.timeout(LEASE_S / 10):
        session, stream = await b.open(opening("s", resume=True))
    assert await b.step(session, stream, 2) == 3.0


async def test_a_session_that_its_owner_does_not_let_go_is_refused_with_a_time_to_retry(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b", lease_s=SHORT_LEASE_S)
    await a.begin("s", 1)
    a.pause()
    with pytest.raises(StoreUnavailable) as refusal:
        await b.open(opening("s", resume=True))
    assert refusal.value.retry_after_s


async def test_a_session_is_found_listed_and_deleted_whichever_process_is_asked(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    _, stream = await a.begin("live", 1)
    await a.park("parked", 1)
    await b.begin("mine", 1)
    assert (await b.registry.find(named("live"))).live
    assert not (await b.registry.find(named("parked"))).live
    assert [info.summary.key.session_id for info in await b.registry.after(named(""), 2)] == ["live", "mine"]
    await b.registry.delete(named("live"))
    assert isinstance(await until_lost(stream), SessionNotFound)
    await b.registry.delete(named("parked"))
    for process in (a, b):
        with pytest.raises(SessionNotFound):
            await process.registry.find(named("live"))
    with pytest.raises(SessionNotFound):
        await b.registry.delete(named("never"))


async def test_a_fork_is_parked_for_every_process_as_soon_as_it_is_made(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    await a.begin("s", 1)
    await SessionCopies(a.registry, None, lifetime_s=60.0).fork(named("s"), named("t"), TOKEN)
    assert not (await b.registry.find(named("t"))).live


async def test_limits_are_those_of_all_processes_together(machine: Machine) -> None:
    a, b = await machine.start("a", max_sessions=2), await machine.start("b", max_sessions=2)
    await a.park("old", 1)
    machine.now_s += 1
    await a.begin("live", 1)
    await b.begin("new", 1)
    assert b.metrics.events.count(("evicted", "max_sessions")) == 1
    with pytest.raises(Evicted):
        await b.open(opening("old", resume=True))
    with pytest.raises(SessionLimit):
        await a.open(opening("one more"))


async def test_what_is_parked_too_long_is_evicted_once(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    await a.park("s", 1)
    machine.now_s += 101
    await asyncio.gather(a.registry.enforce_limits(), b.registry.enforce_limits())
    evicted = [event for process in (a, b) for event in process.metrics.events if event[0] == "evicted"]
    assert evicted == [("evicted", "resume_window_s")]
    assert await a.store.find(named("s")) is None


async def test_every_process_tells_what_is_parked_until_nothing_is(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    await a.park("s", 1)
    for process in (a, b):
        await process.registry.enforce_limits()
    machine.now_s += 101
    for process in (a, b):
        await process.registry.enforce_limits()
        told = [event[1] for event in process.metrics.events if event[0] == "parked"]
        assert 1 in told
        assert told[-1] == 0


async def test_past_the_parked_bytes_the_longest_parked_go(machine: Machine) -> None:
    a, b = await machine.start("a", max_parked_bytes=8), await machine.start("b", max_parked_bytes=8)
    await a.park("old", 1)
    machine.now_s += 1
    await b.park("newer", 1)
    await b.registry.enforce_limits()
    assert [info.summary.key.session_id for info in await a.registry.after(named(""), 5)] == ["newer"]


async def test_a_parked_session_that_comes_back_to_its_process_at_once_is_its_own_again(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    session, stream = await a.begin("s", 1)
    a.registry.leave(session, stream)
    writing = asyncio.create_task(a.registry.checkpoints.write_changed())
    await asyncio.sleep(0)
    session, stream = await a.open(opening("s", resume=True))
    await writing
    assert await a.step(session, stream, 2) == 3.0
    stored = await b.store.find(SessionKey("", "s"))
    assert stored is not None
    assert (stored.owner, stored.owner_lives) == ("a", True)


async def test_a_parked_session_that_another_process_takes_at_the_same_moment_comes_back_from_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    session, stream = await a.begin("s", 1)
    await a.registry.checkpoints.write_changed()
    a.registry.leave(session, stream)
    take, takes = a.store.take, 0

    async def late_take(key: SessionKey, fence: int) -> SessionRecord | None:
        nonlocal takes
        takes += 1
        if takes == 1:
            await a.registry.checkpoints.write_changed()
            at_b, stream_at_b = await b.open(opening("s", resume=True))
            await b.step(at_b, stream_at_b, 2)
        return await take(key, fence)

    monkeypatch.setattr(a.store, "take", late_take)
    session, stream = await a.open(opening("s", resume=True))
    assert await a.step(session, stream, 3) == 6.0


async def test_a_session_whose_taking_was_done_but_never_answered_is_still_ours(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await machine.start("a")
    session, stream = await a.begin("s", 1)
    await a.registry.checkpoints.write_changed()
    a.registry.leave(session, stream)
    take = a.store.take

    async def unanswered_take(key: SessionKey, fence: int) -> SessionRecord | None:
        monkeypatch.undo()
        await take(key, fence)
        raise StoreError("the connection is gone")

    monkeypatch.setattr(a.store, "take", unanswered_take)
    session, stream = await a.open(opening("s", resume=True))
    await a.step(session, stream, 2)
    for _ in range(2):  # the first is refused, for it has the fence from before
        await a.registry.checkpoints.write_changed()
    assert stream.lost is None
    record = await a.store.read(named("s"))
    assert record is not None
    assert record.row.tolist() == [3.0]


async def test_a_closed_session_is_gone_for_all(machine: Machine) -> None:
    a, b = await machine.start("a"), await machine.start("b")
    session, stream = await a.open(opening("s"))
    assert await a.registry.close(session, stream)
    with pytest.raises(SessionNotFound):
        await b.open(opening("s", resume=True))
