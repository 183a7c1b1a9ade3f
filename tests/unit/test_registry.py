import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest

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
from service.sessions.record import SessionKey
from service.sessions.registry import Opening, SessionLimits, SessionRegistry
from service.sessions.session import Session
from tests.support.bundles import features, manifest
from tests.support.fakes import CountingMetrics, FakeExecutor, FakeStore, FakeStream, column

MODEL = ModelKey("vanilla", 1)
TOKEN = b"0123456789abcdef"
OTHER_TOKEN = b"fedcba9876543210"


def described(**network: object) -> Manifest:
    spec = NetworkSpec.model_validate({"cell": "tanh", "features": 3, "hidden_size": 2, "outputs": 2} | network)
    return manifest("vanilla", spec, features(3))


def opening(session_id: str, token: bytes = TOKEN, **wanted: bool) -> Opening:
    return Opening(SessionKey("", session_id), token, **wanted)


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
            store_timeout_s=0.05,
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
    loop = asyncio.create_task(engine.run())
    yield Server(engine)
    loop.cancel()
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
