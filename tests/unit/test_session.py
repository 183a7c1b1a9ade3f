import asyncio
from collections.abc import AsyncIterator

import pytest

from models.manifest import ModelKey
from service.engine.step_engine import StepEngine
from service.errors import ExecutionFailed, ResumePointLost, SessionMoved, StepOutOfOrder
from service.sessions.record import SessionKey, SessionRecord
from service.sessions.session import AppliedSteps, Session, admits, hash_of
from tests.support.fakes import RAISES, TURNS_NAN, CountingMetrics, FakeExecutor, FakeStream, column

MODEL = ModelKey("one", 1)


@pytest.fixture
def stream() -> FakeStream:
    return FakeStream()


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
def metrics() -> CountingMetrics:
    return CountingMetrics()


@pytest.fixture
async def session(executor: FakeExecutor, metrics: CountingMetrics, stream: FakeStream) -> AsyncIterator[Session]:
    engine = StepEngine({MODEL: executor}, max_tick_sessions=4, metrics=CountingMetrics(), max_loop_tick_s=0)
    record = SessionRecord(SessionKey("", "pump-7"), MODEL, "0" * 64, b"", 0, 0, engine.initial_row(MODEL))
    session = Session(record, engine, metrics, max_held_bytes=10_000, clock=lambda: 0.0)
    session.take(stream, 0)
    yield session
    executor.gate.set()
    engine.close()


def sums(applied: AppliedSteps) -> list[float]:
    return [float(total) for total in applied.outputs[:, 0]]


async def test_steps_are_counted_from_zero_over_all_messages(session: Session, stream: FakeStream) -> None:
    first = await session.apply(stream, 0, column(1, 2))
    second = await session.apply(stream, 2, column(3))
    assert (first.first_step, sums(first)) == (0, [1, 3])
    assert (second.first_step, sums(second)) == (2, [6])
    assert session.next_step == 3


@pytest.mark.parametrize("index", [3, 2**64 - 1])
async def test_an_index_behind_a_gap_is_refused_and_nothing_changes(
    session: Session, stream: FakeStream, index: int
) -> None:
    await session.apply(stream, 0, column(1, 2))
    with pytest.raises(StepOutOfOrder) as refusal:
        await session.apply(stream, index, column(100))
    assert refusal.value.metadata == {"expected_step": "2"}
    assert sums(await session.apply(stream, 2, column(3))) == [6]


async def test_a_reset_gives_the_initial_state_and_counting_goes_on(session: Session, stream: FakeStream) -> None:
    await session.apply(stream, 0, column(1, 2))
    session.reset(2)
    assert session.next_step == 2
    assert sums(await session.apply(stream, 2, column(10))) == [10]


@pytest.mark.parametrize("index", [0, 1, 3])
async def test_a_reset_out_of_order_is_refused_and_nothing_changes(
    session: Session, stream: FakeStream, index: int
) -> None:
    await session.apply(stream, 0, column(1, 2))
    with pytest.raises(StepOutOfOrder):
        session.reset(index)
    assert sums(await session.apply(stream, 2, column(3))) == [6]


@pytest.mark.parametrize("bad", [RAISES, TURNS_NAN])
async def test_a_failed_step_is_not_counted_and_may_be_sent_again(
    session: Session, stream: FakeStream, bad: float
) -> None:
    applied = await session.apply(stream, 0, column(1, bad, 3))
    assert sums(applied) == [1]
    assert isinstance(applied.failure, ExecutionFailed)
    assert session.next_step == 1
    assert sums(await session.apply(stream, 1, column(2, 3))) == [3, 6]


async def test_a_cancelled_message_changes_nothing(
    session: Session, stream: FakeStream, executor: FakeExecutor
) -> None:
    await session.apply(stream, 0, column(1))
    executor.gate.clear()
    executor.entered.clear()
    cancelled = asyncio.create_task(session.apply(stream, 1, column(50, 60)))
    assert await asyncio.to_thread(executor.entered.wait, 10)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    executor.gate.set()
    assert session.next_step == 1
    assert sums(await session.apply(stream, 1, column(2))) == [3]


async def test_applied_steps_are_counted_once_and_failed_ones_never(
    session: Session, stream: FakeStream, metrics: CountingMetrics
) -> None:
    await session.apply(stream, 0, column(1, 2, TURNS_NAN))
    with pytest.raises(StepOutOfOrder):
        await session.apply(stream, 9, column(1))
    assert metrics.events == [("steps", MODEL, 2)]


async def test_steps_that_are_sent_again_are_answered_as_before_and_change_nothing(
    session: Session, stream: FakeStream, executor: FakeExecutor
) -> None:
    await session.apply(stream, 0, column(1, 2, 3))
    ticks = len(executor.ticks)
    again = await session.apply(stream, 1, column(50, 60))
    assert (again.first_step, sums(again), again.next_step) == (1, [3, 6], 3)
    assert len(executor.ticks) == ticks
    assert sums(await session.apply(stream, 3, column(4))) == [10]


async def test_of_a_message_that_overlaps_only_the_new_steps_are_applied(session: Session, stream: FakeStream) -> None:
    await session.apply(stream, 0, column(1, 2))
    both = await session.apply(stream, 1, column(50, 3))
    assert (both.first_step, sums(both)) == (1, [3, 6])


async def test_acknowledged_steps_that_are_sent_again_get_an_answer_without_rows(
    session: Session, stream: FakeStream
) -> None:
    await session.apply(stream, 0, column(1, 2))
    session.acknowledge(2)
    again = await session.apply(stream, 0, column(1, 2))
    assert (sums(again) if len(again.outputs) else [], again.next_step) == ([], 2)


async def test_a_newer_stream_gets_the_missed_answers_and_the_older_one_loses_the_session(
    session: Session, stream: FakeStream
) -> None:
    await session.apply(stream, 0, column(1, 2))
    newer = FakeStream()
    (missed,) = session.take(newer, 1)
    assert (missed.first_row_step, missed.outputs[:, 0].tolist()) == (1, [3])
    assert isinstance(stream.lost, SessionMoved)
    assert sums(await session.apply(newer, 2, column(3))) == [6]


async def test_what_the_older_stream_has_under_way_is_dropped(
    session: Session, stream: FakeStream, executor: FakeExecutor
) -> None:
    executor.gate.clear()
    under_way = asyncio.create_task(session.apply(stream, 0, column(100)))
    assert await asyncio.to_thread(executor.entered.wait, 10)
    newer = FakeStream()
    session.take(newer, 0)
    executor.gate.set()
    with pytest.raises(SessionMoved):
        await under_way
    assert session.next_step == 0
    assert sums(await session.apply(newer, 0, column(1))) == [1]


async def test_a_stream_that_asks_for_lost_answers_takes_nothing_over(session: Session, stream: FakeStream) -> None:
    await session.apply(stream, 0, column(1, 2))
    session.acknowledge(2)
    with pytest.raises(ResumePointLost):
        session.take(FakeStream(), 0)
    assert stream.lost is None
    assert sums(await session.apply(stream, 2, column(3))) == [6]


async def test_a_reset_that_is_sent_again_behind_later_steps_changes_nothing(
    session: Session, stream: FakeStream
) -> None:
    await session.apply(stream, 0, column(1, 2))
    session.reset(2)
    await session.apply(stream, 2, column(10))
    session.reset(2)
    assert sums(await session.apply(stream, 3, column(1))) == [11]


async def test_a_checkpoint_has_all_of_one_moment(session: Session, stream: FakeStream) -> None:
    await session.apply(stream, 0, column(1, 2))
    record = session.record()
    await session.apply(stream, 2, column(100))
    assert (record.next_step, record.row.tolist(), len(record.held)) == (2, [3], 1)


def test_only_the_token_that_was_hashed_admits() -> None:
    kept = hash_of(b"0123456789abcdef")
    assert b"0123456789abcdef" not in kept
    assert admits(kept, b"0123456789abcdef")
    assert not admits(kept, b"0123456789abcdeF")
    assert not admits(kept, b"")
    assert not admits(hash_of(b""), b"")
