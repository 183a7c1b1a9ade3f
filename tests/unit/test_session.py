import asyncio
from collections.abc import AsyncIterator

import pytest

from models.manifest import ModelKey
from service.engine.step_engine import StepEngine
from service.errors import ExecutionFailed, StepOutOfOrder
from service.sessions.session import AppliedSteps, Session
from tests.support.fakes import RAISES, TURNS_NAN, CountingMetrics, FakeExecutor, column

MODEL = ModelKey("one", 1)


@pytest.fixture
def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
def metrics() -> CountingMetrics:
    return CountingMetrics()


@pytest.fixture
async def session(executor: FakeExecutor, metrics: CountingMetrics) -> AsyncIterator[Session]:
    engine = StepEngine({MODEL: executor}, max_tick_sessions=4, metrics=CountingMetrics())
    loop = asyncio.create_task(engine.run())
    yield Session("pump-7", MODEL, engine, metrics)
    executor.gate.set()
    loop.cancel()
    engine.close()


def sums(applied: AppliedSteps) -> list[float]:
    return [float(total) for total in applied.outputs[:, 0]]


async def test_steps_are_counted_from_zero_over_all_messages(session: Session) -> None:
    first = await session.apply(0, column(1, 2))
    second = await session.apply(2, column(3))
    assert (first.first_step, sums(first)) == (0, [1, 3])
    assert (second.first_step, sums(second)) == (2, [6])
    assert session.next_step == 3


@pytest.mark.parametrize("index", [0, 1, 3, 2**64 - 1])
async def test_any_index_but_the_next_is_refused_and_nothing_changes(session: Session, index: int) -> None:
    await session.apply(0, column(1, 2))
    with pytest.raises(StepOutOfOrder) as refusal:
        await session.apply(index, column(100))
    assert refusal.value.metadata == {"expected_step": "2"}
    assert sums(await session.apply(2, column(3))) == [6]


async def test_a_reset_gives_the_initial_state_and_counting_goes_on(session: Session) -> None:
    await session.apply(0, column(1, 2))
    session.reset(2)
    assert session.next_step == 2
    assert sums(await session.apply(2, column(10))) == [10]


@pytest.mark.parametrize("index", [0, 1, 3])
async def test_a_reset_out_of_order_is_refused_and_nothing_changes(session: Session, index: int) -> None:
    await session.apply(0, column(1, 2))
    with pytest.raises(StepOutOfOrder):
        session.reset(index)
    assert sums(await session.apply(2, column(3))) == [6]


@pytest.mark.parametrize("bad", [RAISES, TURNS_NAN])
async def test_a_failed_step_is_not_counted_and_may_be_sent_again(session: Session, bad: float) -> None:
    applied = await session.apply(0, column(1, bad, 3))
    assert sums(applied) == [1]
    assert isinstance(applied.failure, ExecutionFailed)
    assert session.next_step == 1
    assert sums(await session.apply(1, column(2, 3))) == [3, 6]


async def test_a_cancelled_message_changes_nothing(session: Session, executor: FakeExecutor) -> None:
    await session.apply(0, column(1))
    executor.gate.clear()
    executor.entered.clear()
    cancelled = asyncio.create_task(session.apply(1, column(50, 60)))
    assert await asyncio.to_thread(executor.entered.wait, 10)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    executor.gate.set()
    assert session.next_step == 1
    assert sums(await session.apply(1, column(2))) == [3]


async def test_applied_steps_are_counted_once_and_failed_ones_never(session: Session, metrics: CountingMetrics) -> None:
    await session.apply(0, column(1, 2, TURNS_NAN))
    with pytest.raises(StepOutOfOrder):
        await session.apply(9, column(1))
    assert metrics.events == [("steps", MODEL, 2)]
