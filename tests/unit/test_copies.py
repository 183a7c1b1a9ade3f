"""Copies of sessions over a store that is slow, down or damaged."""

import asyncio
from collections.abc import AsyncIterator, Awaitable

import numpy as np
import pytest

from models.manifest import ModelKey
from service.engine.step_engine import StepEngine
from service.errors import BundleMismatch, ResumePointLost, SessionNotFound, StoreUnavailable
from service.sessions.copies import Copy, SessionCopies
from service.sessions.record import SessionState
from service.sessions.registry import SessionRegistry
from service.sessions.snapshots import SnapshotKeys, encode
from tests.support.fakes import CountingMetrics, FakeExecutor
from tests.unit.test_registry import MODEL, TOKEN, Server, named, open_, opening, park, step

NEW_TOKEN = b"n" * 16
KEYS = SnapshotKeys({"key": bytes(32)})


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
async def server(executor: FakeExecutor) -> AsyncIterator[Server]:
    engine = StepEngine({MODEL: executor}, max_tick_sessions=4, metrics=CountingMetrics(), max_loop_tick_s=0)
    yield Server(engine)
    engine.close()


def copies(registry: SessionRegistry) -> SessionCopies:
    return SessionCopies(registry, KEYS, lifetime_s=60.0)


def fork(registry: SessionRegistry) -> Awaitable[Copy]:
    return copies(registry).fork(named("a"), named("b"), NEW_TOKEN)


def snapshot(row: list[float], model: ModelKey = MODEL) -> bytes:
    state = SessionState(model, "0" * 64, next_step=3, row=np.array(row, np.float32))
    return encode(state, KEYS, now_s=0.0, lifetime_s=0.0)[1]


async def test_a_copy_is_in_the_store_when_it_is_answered(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 5)
    info, pending = await fork(registry)
    assert (info.live, info.summary.next_step, pending) == (False, 1, 0)
    written = server.store.records[named("b")]
    assert (written.next_step, written.answered_step, written.held, written.row.tolist()) == (1, 1, (), [5.0])
    again, stream = await open_(await server.start(), opening("b", NEW_TOKEN, resume=True, answered_step=1))
    assert await step(registry, again, stream, 2) == 7


async def test_the_original_keeps_its_stream_and_its_row(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 5)
    await fork(registry)
    copy, copied_stream = await open_(registry, opening("b", NEW_TOKEN, resume=True, answered_step=1))
    assert await step(registry, copy, copied_stream, 1) == 6
    assert await step(registry, session, stream, 10) == 15
    assert stream.lost is None


async def test_a_step_under_way_is_in_no_copy(server: Server, executor: FakeExecutor) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 5)
    executor.gate.clear()
    executor.entered.clear()
    under_way = asyncio.create_task(step(registry, session, stream, 1))
    await asyncio.to_thread(executor.entered.wait, 10)
    forked = await fork(registry)
    executor.gate.set()
    assert await under_way == 6
    assert (forked.info.summary.next_step, session.next_step) == (1, 2)
    assert server.store.records[named("b")].row.tolist() == [5.0]


@pytest.mark.parametrize("trouble", ["down", "full"])
async def test_a_copy_that_cannot_be_made_durable_is_refused_and_gone(server: Server, trouble: str) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 5)
    setattr(server.store, trouble, True)
    for _ in range(2):  # the store is found to be down, and known to be
        with pytest.raises(StoreUnavailable):
            await fork(registry)
        assert [info.summary.key for info in await registry.after(named(""), 10)] == [named("a")]
    setattr(server.store, trouble, False)
    await registry.checkpoints.write_changed()
    await registry.enforce_limits()
    assert set(server.store.records) == {named("a")}
    assert (await fork(registry)).info.summary.next_step == 1


async def test_a_copy_that_is_written_too_late_is_erased_behind_it(server: Server) -> None:
    registry = await server.start()
    await open_(registry, opening("a"))
    await registry.checkpoints.write_changed()
    server.store.gate.clear()
    with pytest.raises(StoreUnavailable):
        await fork(registry)
    server.store.gate.set()
    await registry.checkpoints.write_changed()
    await registry.enforce_limits()
    assert set(server.store.records) == {named("a")}


async def test_a_session_that_is_resumed_while_it_is_read_is_copied_all_the_same(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1, 2)
    server.store.asked.clear()
    server.store.gate.clear()
    forked = asyncio.ensure_future(fork(registry))
    await server.store.asked.wait()
    resumed = asyncio.create_task(open_(registry, opening("a", resume=True)))
    server.store.gate.set()
    assert (await forked).info.summary.next_step == 2
    session, stream = await resumed
    assert await step(registry, session, stream, 3) == 6


async def test_a_session_that_is_deleted_while_it_is_read_is_not_copied(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.asked.clear()
    server.store.gate.clear()
    forked = asyncio.ensure_future(fork(registry))
    await server.store.asked.wait()
    deleted = asyncio.create_task(registry.delete(named("a")))
    await asyncio.sleep(0)  # it is gone from memory at once
    server.store.gate.set()
    with pytest.raises(SessionNotFound):
        await forked
    await deleted
    assert server.store.records == {}


async def test_what_is_damaged_in_the_store_is_not_copied(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.damaged.add(named("a"))
    with pytest.raises(ResumePointLost):
        await fork(registry)
    with pytest.raises(ResumePointLost):
        await copies(registry).export(named("a"))


@pytest.mark.parametrize("row", [[], [1.0, 2.0]])
async def test_a_row_of_another_size_would_spoil_the_ticks_of_others_and_is_refused(
    server: Server, row: list[float]
) -> None:
    registry = await server.start()
    with pytest.raises(BundleMismatch):
        await copies(registry).import_(snapshot(row), named("b"), TOKEN)
    assert await registry.after(named(""), 10) == []
    assert (await copies(registry).import_(snapshot([1.0]), named("b"), TOKEN)).info.summary.next_step == 3
