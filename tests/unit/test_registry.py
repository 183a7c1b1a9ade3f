import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import numpy as np
import pytest
from prometheus_client import generate_latest

from models.manifest import Manifest, ModelKey
from models.recurrent import NetworkSpec
from service.engine.step_engine import StepEngine
from service.errors import (
    BundleMismatch,
    Evicted,
    FieldInvalid,
    ModelNotStreamable,
    ResumePointLost,
    SessionExists,
    SessionLimit,
    SessionMoved,
    SessionNotFound,
    StoreUnavailable,
)
from service.metrics import Metrics
from service.sessions import evictions
from service.sessions.erasure import SCRUB_AGAIN_S
from service.sessions.index import SessionKeys
from service.sessions.limits import EVICTING, SessionLimits
from service.sessions.record import SessionKey
from service.sessions.registry import Opening, SessionRegistry
from service.sessions.session import Session
from tests.support.bundles import features, manifest
from tests.support.fakes import CountingMetrics, FakeExecutor, FakeStore, FakeStream, column

Result = TypeVar("Result")

MODEL = ModelKey("vanilla", 1)
TOKEN = b"0123456789abcdef"
OTHER_TOKEN = b"fedcba9876543210"


def described(**network: object) -> Manifest:
    spec = NetworkSpec.model_validate({"cell": "tanh", "features": 3, "hidden_size": 2, "outputs": 2} | network)
    return manifest("vanilla", spec, features(3))


def opening(session_id: str, token: bytes = TOKEN, **wanted: Any) -> Opening:
    return Opening(named(session_id), token, **wanted)


def named(session_id: str) -> SessionKey:
    return SessionKey("", session_id)


class Server:
    """A registry over a store, a clock that stands still, and how to start another one over the same store."""

    def __init__(self, engine: StepEngine) -> None:
        self.engine = engine
        self.store = FakeStore()
        self.now_s = 1_000.0
        self.metrics = CountingMetrics()
        self.weights = "0" * 64

    async def start(self, **limits: float) -> SessionRegistry:
        given = {
            "max_streams": 10, "max_sessions": 10, "max_sessions_per_tenant": 0, "max_parked_bytes": 0,
            "max_held_bytes": 10_000, "resume_window_s": 100.0, "idle_timeout_s": 0.0, "max_age_s": 0.0,
        } | limits  # fmt: skip
        served = described().model_copy(update={"weights_sha256": self.weights})
        registry = SessionRegistry(
            self.engine,
            self.store,
            {MODEL: served},
            SessionLimits(**given),  # type: ignore[arg-type]
            checkpoint_interval_s=1.0,
            checkpoint_steps=0,
            store_timeout_s=0.25,
            metrics=self.metrics,
            clock=lambda: self.now_s,
        )
        await registry.start()
        return registry

    def count(self, *event: object) -> int:
        return self.metrics.events.count(event)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    engine = StepEngine({MODEL: FakeExecutor()}, max_tick_sessions=4, metrics=CountingMetrics())
    yield Server(engine)
    engine.close()


async def open_(registry: SessionRegistry, wanted: Opening) -> tuple[Session, FakeStream]:
    stream = FakeStream()
    session, _ = await registry.open(wanted, described(), stream)
    return session, stream


async def step(registry: SessionRegistry, session: Session, stream: FakeStream, value: float) -> float:
    applied = await session.apply(stream, session.next_step, column(value))
    registry.changed(session, 1)
    return float(applied.outputs[0, 0])


async def park(registry: SessionRegistry, session_id: str, *values: float) -> None:
    """Open a session, step it, and leave it in the store."""
    session, stream = await open_(registry, opening(session_id))
    for value in values:
        await step(registry, session, stream, value)
    registry.leave(session, stream)
    await registry.checkpoints.write_changed()


async def test_a_session_begins_at_step_zero(server: Server) -> None:
    session, _ = await open_(await server.start(), opening("a"))
    assert (session.key.session_id, session.model, session.next_step) == ("a", MODEL, 0)


@pytest.mark.parametrize("token", [OTHER_TOKEN, b""])
async def test_an_id_in_use_is_never_taken_over_without_its_token(server: Server, token: bytes) -> None:
    registry = await server.start()
    _, stream = await open_(registry, opening("a"))
    with pytest.raises(SessionExists) as refusal:
        await open_(registry, opening("a", token))
    assert refusal.value.metadata == {"session_id": "a"}
    assert stream.lost is None
    await park(registry, "b", 1)
    with pytest.raises(SessionExists):
        await open_(registry, opening("b", token))


async def test_an_open_that_is_sent_again_gets_the_same_session(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    again, _ = await open_(registry, opening("a"))
    assert again is session
    assert isinstance(stream.lost, SessionMoved)


async def test_a_session_without_a_token_ends_with_its_stream(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a", b""))
    registry.leave(session, stream)
    await registry.checkpoints.write_changed()
    assert server.store.records == {}
    again, _ = await open_(registry, opening("a", b""))
    assert again is not session


async def test_a_parked_session_goes_on_from_the_store(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1, 2)
    session, stream = await open_(registry, opening("a", resume=True))
    assert session.next_step == 2
    assert await step(registry, session, stream, 3) == 6
    assert server.count("resumed", MODEL) == 1


async def test_a_session_survives_the_end_of_its_server_as_of_the_last_checkpoint(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 1)
    await registry.checkpoints.write_changed()
    assert session.durable_step == 1
    await step(registry, session, stream, 50)  # lost in the crash
    after, stream = await open_(await server.start(), opening("a", resume=True))
    assert after.next_step == after.durable_step == 1
    assert await step(registry, after, stream, 2) == 3


async def test_the_missed_answers_come_out_of_the_store_too(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1, 2)
    stream = FakeStream()
    _, missed = await (await server.start()).open(opening("a", resume=True), described(), stream)
    assert np.concatenate([held.outputs for held in missed])[:, 0].tolist() == [1, 3]


async def test_to_resume_what_is_not_there_is_refused_and_begins_nothing(server: Server) -> None:
    registry = await server.start()
    with pytest.raises(SessionNotFound):
        await open_(registry, opening("a", resume=True))
    assert server.count("opened", MODEL) == 0


async def test_a_session_of_other_weights_is_refused(server: Server) -> None:
    await park(await server.start(), "a", 1)
    server.weights = "1" * 64
    registry = await server.start()
    with pytest.raises(BundleMismatch):
        await open_(registry, opening("a", resume=True))


async def test_a_closed_session_is_erased_and_its_id_free_again(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 1)
    await registry.checkpoints.write_changed()
    session.acknowledge(1)
    await registry.close(session, stream)
    assert server.store.records == {}
    again, _ = await open_(registry, opening("a", OTHER_TOKEN))
    assert again.next_step == 0


async def test_a_closed_session_whose_answers_are_not_acknowledged_is_parked(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 7)
    await registry.close(session, stream)
    _, missed = await registry.open(opening("a", resume=True), described(), FakeStream())
    assert [held.outputs[0, 0] for held in missed] == [7]


async def test_a_stream_hears_of_durable_steps_when_nothing_newer_is_under_way(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 1)
    await registry.checkpoints.write_changed()
    assert stream.times_durable == 1


async def test_a_store_that_is_down_stops_no_step_but_nothing_becomes_durable(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    server.store.down = True
    assert await step(registry, session, stream, 1) == 1
    await registry.checkpoints.write_changed()
    assert (session.durable_step, registry.durable) == (0, False)
    assert server.count("store available", False) == 1
    server.store.down = False
    await registry.checkpoints.write_changed()
    assert (session.durable_step, registry.durable) == (1, True)


async def test_the_lag_grows_while_the_store_is_down_and_is_nothing_once_all_is_written(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 1)
    server.store.down = True
    await registry.checkpoints.write_changed()
    sessions, lag_s = registry.checkpoints.lag()
    assert (sessions, registry.checkpoints.lag()[1] > lag_s > 0) == (1, True)
    assert server.count("store failed", "write") >= 1
    server.store.down = False
    await registry.checkpoints.write_changed()
    assert registry.checkpoints.lag() == (0, 0.0)


async def test_the_lag_grows_while_a_write_hangs(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 1)
    server.store.gate.clear()
    server.store.asked.clear()
    writing = asyncio.create_task(registry.checkpoints.write_changed())
    await server.store.asked.wait()
    sessions, lag_s = registry.checkpoints.lag()
    assert (sessions, registry.checkpoints.lag()[1] > lag_s > 0) == (1, True)
    server.store.gate.set()
    await writing
    assert registry.checkpoints.lag() == (0, 0.0)


async def test_who_demands_durability_is_refused_while_the_store_is_down(server: Server) -> None:
    registry = await server.start()
    await open_(registry, opening("a", require_durable=True))
    server.store.down = True
    await registry.checkpoints.write_changed()
    with pytest.raises(StoreUnavailable) as refusal:
        await open_(registry, opening("b", require_durable=True))
    assert refusal.value.retry_after_s
    await open_(registry, opening("b"))


async def test_a_store_that_does_not_answer_in_time_is_unavailable_to_a_resume(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.gate.clear()
    with pytest.raises(StoreUnavailable):
        await open_(registry, opening("a", resume=True))
    server.store.gate.set()
    session, _ = await open_(registry, opening("a", resume=True))
    assert session.next_step == 1


async def test_a_session_parked_while_the_store_is_down_is_still_there(server: Server) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 1)
    server.store.down = True
    registry.leave(session, stream)
    await registry.checkpoints.write_changed()
    again, _ = await open_(registry, opening("a", resume=True))
    assert again.next_step == 1


async def test_a_session_parked_while_the_store_is_down_is_gone_after_the_resume_window_all_the_same(
    server: Server,
) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    server.store.down = True
    registry.leave(session, stream)
    server.now_s += 101
    await registry.enforce_limits()
    with pytest.raises(Evicted) as refusal:
        await open_(registry, opening("a", resume=True))
    assert refusal.value.metadata["limit"] == "resume_window_s"


async def test_sessions_parked_while_the_store_is_down_count_as_parked_bytes(server: Server) -> None:
    registry = await server.start(max_parked_bytes=8)  # a state of 4 bytes and an answer of 4 each
    server.store.down = True
    for session_id in ("old", "newer"):
        session, stream = await open_(registry, opening(session_id))
        await step(registry, session, stream, 1)
        server.now_s += 1
        registry.leave(session, stream)
    await registry.enforce_limits()
    with pytest.raises(Evicted):
        await open_(registry, opening("old", resume=True))
    await open_(registry, opening("newer", resume=True))


async def test_a_damaged_record_is_lost_alone_and_its_id_is_free_once_it_is_deleted(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    await park(registry, "b", 1)
    server.store.damaged.add(SessionKey("", "a"))
    for resume in (True, False):
        with pytest.raises(ResumePointLost, match="damaged"):
            await open_(registry, opening("a", resume=resume))
    assert registry.durable
    await open_(registry, opening("b", resume=True))
    await registry.delete(SessionKey("", "a"))
    server.store.damaged.clear()
    assert (await open_(registry, opening("a")))[0].next_step == 0


async def test_two_that_resume_a_parked_session_at_once_get_one_session(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    (first, one), (second, _) = await asyncio.gather(
        open_(registry, opening("a", resume=True)), open_(registry, opening("a", resume=True))
    )
    assert first is second
    assert isinstance(one.lost, SessionMoved)


async def test_past_the_streams_one_more_is_refused_until_another_ends(server: Server) -> None:
    registry = await server.start(max_streams=1)
    session, stream = await open_(registry, opening("a"))
    with pytest.raises(SessionLimit) as refusal:
        await open_(registry, opening("b"))
    assert refusal.value.metadata == {"limit": "1"}
    assert refusal.value.retry_after_s
    registry.leave(session, stream)
    await open_(registry, opening("b"))


@pytest.mark.parametrize("limit", ["max_sessions", "max_sessions_per_tenant"])
async def test_past_the_sessions_the_longest_parked_is_evicted_for_a_new_one(server: Server, limit: str) -> None:
    registry = await server.start(**{limit: 2})
    await park(registry, "old", 1)
    server.now_s += 1
    await park(registry, "newer", 1)
    await open_(registry, opening("new"))
    assert server.count("evicted", limit) == 1
    with pytest.raises(Evicted) as refusal:
        await open_(registry, opening("old", resume=True))
    assert refusal.value.metadata == {"limit": limit, "resumable": "false"}
    await open_(registry, opening("newer", resume=True))
    with pytest.raises(SessionLimit):
        await open_(registry, opening("one more"))


@pytest.mark.parametrize("limit", ["max_sessions", "max_sessions_per_tenant"])
async def test_where_a_limit_is_lower_than_at_the_last_start_the_longest_parked_go(server: Server, limit: str) -> None:
    registry = await server.start()
    for session_id in ("old", "newer", "newest"):
        await park(registry, session_id, 1)
        server.now_s += 1
    registry = await server.start(**{limit: 2})
    assert [key.session_id for key in server.store.records] == ["newer", "newest"]
    assert server.count("evicted", limit) == 1


async def test_past_the_parked_bytes_the_longest_parked_go(server: Server) -> None:
    registry = await server.start(max_parked_bytes=8)  # a state of 4 bytes and an answer of 4 each
    await park(registry, "old", 1)
    server.now_s += 1
    await park(registry, "newer", 1)
    await registry.enforce_limits()
    assert [key.session_id for key in server.store.records] == ["newer"]


async def test_a_parked_session_is_gone_after_the_resume_window(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.now_s += 101
    await registry.enforce_limits()
    assert server.store.records == {}
    with pytest.raises(Evicted) as refusal:
        await open_(registry, opening("a", resume=True))
    assert refusal.value.metadata["limit"] == "resume_window_s"


async def test_the_resume_window_runs_while_the_server_is_down(server: Server) -> None:
    await park(await server.start(), "a", 1)
    server.now_s += 101
    with pytest.raises(Evicted):
        await open_(await server.start(), opening("a", resume=True))


async def test_an_idle_stream_loses_its_session_which_is_parked(server: Server) -> None:
    registry = await server.start(idle_timeout_s=10.0)
    session, stream = await open_(registry, opening("a"))
    await step(registry, session, stream, 1)
    server.now_s += 11
    await registry.enforce_limits()
    assert isinstance(stream.lost, Evicted)
    assert stream.lost.metadata == {"limit": "idle_timeout_s", "resumable": "true"}
    again, _ = await open_(registry, opening("a", resume=True))
    assert again.next_step == 1


@pytest.mark.parametrize("live", [True, False])
async def test_a_session_that_is_too_old_ends_live_or_parked(server: Server, live: bool) -> None:
    registry = await server.start(max_age_s=10.0)
    stream = FakeStream()
    if live:
        _, stream = await open_(registry, opening("a"))
    else:
        await park(registry, "a", 1)
    server.now_s += 11
    await registry.enforce_limits()
    assert isinstance(stream.lost, Evicted) == live
    with pytest.raises(Evicted):
        await open_(registry, opening("a", resume=True))
    assert server.store.records == {}


async def test_a_resume_window_of_0_means_that_nothing_outlives_its_stream(server: Server) -> None:
    registry = await server.start(resume_window_s=0.0)
    session, stream = await open_(registry, opening("a"))
    assert not session.resumable
    registry.leave(session, stream)
    with pytest.raises(SessionNotFound):
        await open_(registry, opening("a", resume=True))


@pytest.mark.parametrize(
    ("network", "reason"), [({"direction": "bidirectional"}, "both ends"), ({"readout": "mean"}, "mean over all steps")]
)
async def test_a_network_that_needs_the_whole_sequence_is_refused_with_the_reason(
    server: Server, network: dict[str, object], reason: str
) -> None:
    registry = await server.start()
    with pytest.raises(ModelNotStreamable, match=reason):
        await registry.open(opening("a"), described(**network), FakeStream())
    assert server.count("opened", MODEL) == 0


@pytest.mark.parametrize("wanted", [{"resume": True}, {"require_durable": True}])
async def test_what_needs_a_token_is_refused_without_one(server: Server, wanted: dict[str, bool]) -> None:
    registry = await server.start()
    with pytest.raises(FieldInvalid) as refusal:
        await open_(registry, opening("a", b"", **wanted))
    assert refusal.value.field == "resume_token"


async def test_a_refused_resume_leaves_the_session_parked(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1, 2)
    session, stream = await open_(registry, opening("a", resume=True))
    session.acknowledge(2)
    registry.leave(session, stream)
    with pytest.raises(ResumePointLost):
        await open_(registry, opening("a", resume=True))
    await registry.checkpoints.write_changed()
    _, missed = await registry.open(
        Opening(SessionKey("", "a"), TOKEN, resume=True, answered_step=2), described(), FakeStream()
    )
    assert missed == []


class ToldWhatIsParked(CountingMetrics):
    """Keeps each time what it was told of parked sessions."""

    def __init__(self) -> None:
        super().__init__()
        self.parked_sessions: list[dict[ModelKey, int]] = []

    def parked(self, sessions: Mapping[ModelKey, int], size_bytes: int) -> None:
        self.parked_sessions.append(dict(sessions))


async def test_a_parked_session_that_is_resumed_before_it_was_written_is_counted_no_more(server: Server) -> None:
    server.metrics = told = ToldWhatIsParked()
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    registry.leave(session, stream)
    await registry.enforce_limits()
    await open_(registry, opening("a", resume=True))
    await registry.enforce_limits()
    assert [counts.get(MODEL) for counts in told.parked_sessions[-2:]] == [1, 0]


def test_evictions_are_counted_from_0_by_every_limit() -> None:
    shown = generate_latest(Metrics().registry).decode()
    assert [f'rnnserve_evictions_total{{limit="{limit}"}} 0.0' in shown for limit in EVICTING] == [True] * 6


# What is over


async def begun(server: Server, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """It has come as far as the store."""
    server.store.asked.clear()
    task = asyncio.create_task(work)
    await server.store.asked.wait()
    return task


async def stored(registry: SessionRegistry, session_id: str) -> tuple[Session, FakeStream]:
    """A live session that is in the store as it is."""
    session, stream = await open_(registry, opening(session_id))
    await registry.checkpoints.write_changed()
    return session, stream


async def test_what_is_over_is_erased_although_the_erasure_was_cancelled_once(server: Server) -> None:
    registry = await server.start()
    first, second = await stored(registry, "first"), await stored(registry, "second")
    server.store.down = True
    await registry.close(*first)
    server.store.gate.clear()
    closing = await begun(server, registry.close(*second))
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    server.store.gate.set()
    await registry.enforce_limits()
    server.store.down = False
    await registry.enforce_limits()
    assert server.store.records == {}


async def test_a_close_says_whether_the_store_has_erased_the_session(server: Server) -> None:
    registry = await server.start()
    first, second = await stored(registry, "first"), await stored(registry, "second")
    assert await registry.close(*first)
    server.store.down = True
    assert not await registry.close(*second)


async def test_a_closed_session_is_not_said_to_be_gone_before_the_store_agrees(server: Server) -> None:
    registry = await server.start()
    first = await stored(registry, "a")
    server.store.down = True
    await registry.close(*first)
    with pytest.raises(StoreUnavailable):
        await open_(registry, opening("a", resume=True))
    server.store.down = False
    with pytest.raises(SessionNotFound):
        await open_(registry, opening("a", resume=True))
    assert server.store.records == {}


async def test_a_closed_session_is_not_begun_anew_by_a_client_that_missed_the_end(server: Server) -> None:
    registry = await server.start()
    await registry.close(*await stored(registry, "a"))
    with pytest.raises(SessionNotFound):
        await open_(registry, opening("a", rebuild=True))
    await open_(registry, opening("a"))


async def test_an_id_that_begins_and_ends_again_while_it_is_erased_is_erased_again(server: Server) -> None:
    registry = await server.start(max_sessions=1)
    first = await stored(registry, "a")
    server.store.gate.clear()
    closing = await begun(server, registry.close(*first))
    second, stream = await open_(registry, opening("a"))
    writing = await begun(server, registry.checkpoints.write_changed())
    registry.leave(second, stream)
    await open_(registry, opening("b"))  # for which the second one is evicted
    server.store.gate.set()
    await asyncio.gather(closing, writing)
    assert named("a") in server.store.records
    await registry.enforce_limits()
    assert named("a") not in server.store.records


async def test_a_session_without_a_token_does_not_save_a_closed_one_of_its_id(server: Server) -> None:
    registry = await server.start()
    closed = await stored(registry, "a")
    server.store.down = True
    await registry.close(*closed)
    await open_(registry, opening("a", b""))
    server.store.down = False
    await registry.enforce_limits()
    assert server.store.records == {}


async def test_a_new_session_outlives_the_late_erasure_of_one_of_its_id(server: Server) -> None:
    registry = await server.start()
    closed = await stored(registry, "a")
    server.store.down = True
    await registry.close(*closed)
    server.store.down = False
    await stored(registry, "a")
    await registry.enforce_limits()
    assert list(server.store.records) == [named("a")]


@pytest.mark.parametrize("by", ["its caller", "the sweep"])
async def test_what_was_deleted_but_not_scrubbed_is_scrubbed_later(server: Server, by: str) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.down = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await registry.delete(named("a"))
    server.store.down = False
    await registry.checkpoints.write_changed()
    if by == "its caller":
        await registry.delete(named("a"))
    else:
        await registry.enforce_limits()
        assert server.store.scrubs == []  # which may be slow, so not at once
        server.now_s += SCRUB_AGAIN_S
        await registry.enforce_limits()
    assert len(server.store.scrubs) == 1
    with pytest.raises(SessionNotFound):
        await registry.delete(named("a"))
    server.now_s += SCRUB_AGAIN_S
    await registry.enforce_limits()
    assert len(server.store.scrubs) == 1


async def test_a_late_scrub_leaves_a_new_session_of_the_id(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.down = True
    with pytest.raises(StoreUnavailable):
        await registry.delete(named("a"))
    server.store.down = False
    await stored(registry, "a")
    server.now_s += SCRUB_AGAIN_S
    await registry.enforce_limits()
    assert len(server.store.scrubs) == 1
    assert list(server.store.records) == [named("a")]


async def test_deletions_that_wait_for_a_scrub_share_the_next_one(server: Server) -> None:
    registry = await server.start()
    for session_id in "abcd":
        await park(registry, session_id, 1)
    server.store.gate.clear()
    deletions = [await begun(server, registry.delete(named("a")))]
    deletions += [asyncio.create_task(registry.delete(named(session_id))) for session_id in "bcd"]
    await asyncio.sleep(0)  # they begin
    server.store.gate.set()
    await asyncio.gather(*deletions)
    assert [[key.session_id for key in keys] for keys in server.store.scrubs] == [["a"], ["b", "c", "d"]]


async def test_a_session_that_is_being_deleted_is_said_to_be_gone_at_once(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.gate.clear()
    deletion = await begun(server, registry.delete(named("a")))
    with pytest.raises(SessionNotFound):
        await open_(registry, opening("a", resume=True))
    server.store.gate.set()
    await deletion


async def test_a_deletion_goes_on_when_its_caller_is_gone(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.gate.clear()
    deletion = await begun(server, registry.delete(named("a")))
    deletion.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deletion
    server.store.gate.set()
    await registry.checkpoints.write_changed()
    server.now_s += SCRUB_AGAIN_S
    await registry.enforce_limits()
    assert len(server.store.scrubs) == 1  # so the first one was not in vain


async def test_a_client_that_can_rebuild_its_session_gets_a_lost_one_anew_but_no_deleted_one(server: Server) -> None:
    registry = await server.start()
    await open_(registry, opening("lost", rebuild=True))
    live, stream = await open_(registry, opening("deleted"))
    await registry.delete(live.key)
    assert isinstance(stream.lost, SessionNotFound)
    for refused in (opening("deleted", rebuild=True), opening("deleted", resume=True)):
        with pytest.raises(SessionNotFound):
            await open_(registry, refused)


async def test_no_evicted_session_is_rebuilt(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.now_s += 101
    await registry.enforce_limits()
    with pytest.raises(Evicted):
        await open_(registry, opening("a", rebuild=True))


async def test_a_session_that_is_there_is_rebuilt_by_going_on(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1, 2)
    session, _ = await open_(registry, opening("a", rebuild=True))
    assert session.next_step == 2


async def test_a_new_session_of_a_deleted_id_may_be_rebuilt_once_it_is_lost(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    await registry.delete(named("a"))
    registry.leave(*await open_(registry, opening("a", token=b"")))
    await open_(registry, opening("a", rebuild=True))


# Whether the store can be written


async def test_durability_is_not_promised_on_the_word_of_a_store_that_was_well_a_while_ago(server: Server) -> None:
    registry = await server.start()
    server.store.full = True
    with pytest.raises(StoreUnavailable):
        await open_(registry, opening("a", require_durable=True))
    server.store.full = False
    await registry.checkpoints.write_changed()
    with pytest.raises(SessionNotFound):
        await open_(registry, opening("a", resume=True))


async def test_a_store_that_can_only_be_read_is_not_available(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.full = True
    await open_(registry, opening("b"))
    await registry.checkpoints.write_changed()
    await open_(registry, opening("a", resume=True))
    assert not registry.durable
    with pytest.raises(StoreUnavailable):
        await open_(registry, opening("c", require_durable=True))


async def test_after_a_failed_read_an_idle_server_finds_out_when_the_store_can_be_written(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    server.store.down = server.store.full = True
    with pytest.raises(StoreUnavailable):
        await open_(registry, opening("a", resume=True))
    for server.store.down in (True, False):
        await registry.checkpoints.write_changed()
        assert not registry.durable
    server.store.full = False
    await registry.checkpoints.write_changed()
    assert registry.durable


async def test_a_round_that_is_cancelled_forgets_no_session(server: Server) -> None:
    registry = await server.start()
    await open_(registry, opening("a"))
    server.store.gate.clear()
    writing = await begun(server, registry.checkpoints.write_changed())
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    server.store.down = True
    server.store.gate.set()
    await asyncio.sleep(0)
    server.store.down = False
    await registry.checkpoints.write_changed()
    assert list(server.store.records) == [named("a")]


async def test_the_end_waits_no_longer_for_the_store_than_it_may_and_counts_what_is_lost(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    registry = await server.start()
    for session_id in "ab":
        session, stream = await open_(registry, opening(session_id))
        registry.leave(session, stream)
    server.store.gate.clear()
    async with asyncio.timeout(5):
        await registry.park_all(0.05)
    assert server.store.scrubs_ended
    assert "2 sessions could not be written" in caplog.text


async def test_the_end_writes_what_has_changed(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a"))
    registry.leave(session, stream)
    await registry.park_all(5.0)
    assert list(server.store.records) == [named("a")]
    assert caplog.text == ""


# Who may have a session


async def test_a_session_is_resumed_with_its_own_version_only(server: Server) -> None:
    registry = await server.start()
    await park(registry, "a", 1)
    with pytest.raises(FieldInvalid) as refusal:
        await open_(registry, opening("a", resume=True, version=2))
    assert refusal.value.field == "version"
    await open_(registry, opening("a", resume=True, version=1))


@pytest.mark.parametrize("live", [True, False])
async def test_another_caller_gets_a_session_only_by_taking_it_over(server: Server, live: bool) -> None:
    registry = await server.start()
    session, stream = await open_(registry, opening("a", caller_id=b"one"))
    if not live:
        registry.leave(session, stream)
        await registry.checkpoints.write_changed()
    with pytest.raises(SessionMoved):
        await open_(registry, opening("a", resume=True, caller_id=b"two"))
    assert stream.lost is None
    again, _ = await open_(registry, opening("a", resume=True, caller_id=b"two", take_over=True))
    assert again.caller_id == b"two"
    assert (stream.lost is not None) == live
    with pytest.raises(SessionMoved):
        await open_(registry, opening("a", resume=True, caller_id=b"one"))


@pytest.mark.parametrize(("first", "second"), [(b"", b"two"), (b"one", b""), (b"one", b"one")])
async def test_callers_without_an_id_and_the_same_one_are_let_in(server: Server, first: bytes, second: bytes) -> None:
    registry = await server.start()
    await open_(registry, opening("a", caller_id=first))
    session, _ = await open_(registry, opening("a", resume=True, caller_id=second))
    assert session.caller_id == second


# Pages


async def test_pages_have_live_and_parked_sessions_of_the_tenant_by_id(server: Server) -> None:
    await park(await server.start(), "d", 1)
    registry = await server.start()
    for session_id in ("e", "a"):
        await park(registry, session_id, 1)
    await open_(registry, opening("c"))
    await open_(registry, Opening(SessionKey("another", "b"), TOKEN))
    await registry.close(*await open_(registry, opening("closed")))
    await registry.delete(named("e"))

    async def page(after: str, sessions: int) -> list[tuple[str, bool]]:
        found = await registry.after(named(after), sessions)
        return [(info.summary.key.session_id, info.live) for info in found]

    assert await page("", 2) == [("a", False), ("c", True)]
    assert await page("c", 2) == [("d", False)]
    assert await page("b", 1) == [("c", True)]


def test_a_page_takes_no_walk_through_all_sessions() -> None:
    keys = SessionKeys()
    keys.update(named(f"{number:06}") for number in range(100_000))
    times_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        assert keys.after(named("050000"), 10)[0] == named("050001")
        times_s.append(time.perf_counter() - start_s)
    assert min(times_s) < 0.002  # ten times what it takes on a slow machine; a walk takes 20 ms


async def test_of_many_sessions_each_look_takes_some_and_after_a_few_all_idle_ones_are_parked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evictions, "LOOKED_AT", 2)
    registry = await server.start(idle_timeout_s=10.0)
    streams = [(await open_(registry, opening(f"s{number}")))[1] for number in range(5)]
    server.now_s += 11
    parked_after = []
    for _ in range(3):
        await registry.enforce_limits()
        parked_after.append(sum(stream.lost is not None for stream in streams))
    assert parked_after == [2, 4, 5]
