import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.executor import Floats
from service.engine.step_engine import StepEngine, Stepped, StepsResult, TickJob
from service.errors import ExecutionFailed
from tests.support.fakes import RAISES, TURNS_NAN, CountingMetrics, FakeExecutor, column

ONE, OTHER = ModelKey("one", 1), ModelKey("other", 1)
ZERO = np.zeros(1, np.float32)


@dataclass
class Bench:
    """An engine of two fake models, running."""

    one: FakeExecutor = field(default_factory=FakeExecutor)
    other: FakeExecutor = field(default_factory=FakeExecutor)
    metrics: CountingMetrics = field(default_factory=CountingMetrics)

    def __post_init__(self) -> None:
        executors = {ONE: self.one, OTHER: self.other}
        self.engine = StepEngine(executors, max_tick_sessions=4, metrics=self.metrics, max_loop_tick_s=0)

    def send(self, *values: float, model: ModelKey = ONE) -> asyncio.Task[StepsResult]:
        return asyncio.create_task(self.engine.step(model, column(*values), self.engine.states(model).add(ZERO)))

    async def hold(self) -> None:
        """Let a tick of `other` wait, so that what is sent meanwhile meets in the next tick."""
        self.other.gate.clear()
        self.other.entered.clear()
        self._held = self.send(0.0, model=OTHER)
        assert await asyncio.to_thread(self.other.entered.wait, 10)

    async def let_go(self) -> None:
        await asyncio.sleep(0)  # so that what was sent has reached the queue
        self.other.gate.set()
        await self._held


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    running = Bench()
    yield running
    running.one.gate.set()
    running.other.gate.set()
    running.engine.close()


def sums(result: StepsResult) -> list[float]:
    return [float(total) for total in result.outputs[:, 0]]


async def test_steps_are_applied_in_order_each_to_the_state_before_it(bench: Bench) -> None:
    result = await bench.send(1, 2, 3)
    assert (sums(result), result.row.tolist(), result.failure) == ([1, 3, 6], [6], None)


async def test_the_initial_state_is_zero_and_as_wide_as_the_executor_says(bench: Bench) -> None:
    bench.one.row_size = 3
    bench.engine.add(ONE, bench.one)
    assert bench.engine.initial_row(ONE).tolist() == [0, 0, 0]


async def test_sessions_with_a_step_ready_share_a_tick(bench: Bench) -> None:
    await bench.hold()
    tasks = [bench.send(value) for value in (1, 2, 3)]
    await bench.let_go()
    assert [sums(result) for result in await asyncio.gather(*tasks)] == [[1], [2], [3]]
    assert bench.one.ticks == [[1, 2, 3]]
    assert bench.metrics.events[-1] == ("tick", ONE, 3)


async def test_the_queue_tells_how_many_steps_wait_and_since_when(bench: Bench) -> None:
    assert bench.engine.queue() == (0, 0.0)
    await bench.hold()
    sent = [bench.send(1, 2, 3), bench.send(1)]
    await asyncio.sleep(0)
    steps, first_age_s = bench.engine.queue()
    assert steps == 4
    _, age_s = bench.engine.queue()
    assert age_s > first_age_s > 0
    await bench.let_go()
    results = await asyncio.gather(*sent)
    assert all(result.waited_s >= age_s for result in results)
    assert results[0].computed_s > 0
    assert bench.engine.queue() == (0, 0.0)


async def test_chunks_of_unequal_length_share_ticks(bench: Bench) -> None:
    await bench.hold()
    long, short = bench.send(1, 2, 3), bench.send(10)
    await bench.let_go()
    assert (sums(await short), sums(await long)) == ([10], [1, 3, 6])
    assert bench.one.ticks == [[1, 10], [2], [3]]


async def test_a_tick_takes_no_more_sessions_than_it_may(bench: Bench) -> None:
    await bench.hold()
    tasks = [bench.send(value) for value in range(5)]
    await bench.let_go()
    await asyncio.gather(*tasks)
    assert bench.one.ticks == [[0, 1, 2, 3], [4]]


async def test_a_long_chunk_delays_a_short_one_by_at_most_one_tick(bench: Bench) -> None:
    bench.one.gate.clear()
    long = bench.send(*range(100, 150))
    assert await asyncio.to_thread(bench.one.entered.wait, 10)
    short = bench.send(7)
    await asyncio.sleep(0)
    bench.one.gate.set()
    assert sums(await short) == [7]
    assert next(i for i, tick in enumerate(bench.one.ticks) if 7 in tick) == 1
    assert len(sums(await long)) == 50


async def test_models_do_not_share_ticks(bench: Bench) -> None:
    await bench.hold()
    one, other = bench.send(1), bench.send(2, model=OTHER)
    await bench.let_go()
    assert (sums(await one), sums(await other)) == ([1], [2])
    assert (bench.one.ticks, bench.other.ticks) == ([[1]], [[0], [2]])


async def test_a_session_whose_step_raises_fails_alone(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    await bench.hold()
    left, guilty, right = bench.send(1), bench.send(RAISES), bench.send(2)
    await bench.let_go()
    assert (sums(await left), sums(await right)) == ([1], [2])
    failed = await guilty
    assert isinstance(failed.failure, ExecutionFailed)
    assert "secret" not in failed.failure.message
    assert "secret" in caplog.text
    assert (len(failed.outputs), len(failed.row)) == (0, 0)


async def test_a_state_that_is_not_finite_is_a_failed_step_and_its_neighbours_go_on(bench: Bench) -> None:
    await bench.hold()
    guilty, neighbour = bench.send(TURNS_NAN), bench.send(5)
    await bench.let_go()
    failed = await guilty
    assert isinstance(failed.failure, ExecutionFailed)
    assert (len(failed.outputs), len(failed.row)) == (0, 0)
    assert sums(await neighbour) == [5]


async def test_a_state_that_is_just_large_is_no_failure(bench: Bench) -> None:
    await bench.hold()
    large, neighbour = bench.send(2.0**120), bench.send(5)
    await bench.let_go()
    assert (sums(await large), sums(await neighbour)) == ([2.0**120], [5])


@pytest.mark.parametrize("bad", [RAISES, TURNS_NAN])
async def test_the_steps_before_a_failed_one_are_kept_and_those_behind_it_are_not_applied(
    bench: Bench, bad: float
) -> None:
    result = await bench.send(1, 2, bad, 4)
    assert (sums(result), result.row.tolist()) == ([1, 3], [3])
    assert isinstance(result.failure, ExecutionFailed)


async def test_a_cancelled_step_leaves_its_neighbours_alone(bench: Bench) -> None:
    await bench.hold()
    cancelled, neighbour = bench.send(1, 2), bench.send(5, 6)
    await asyncio.sleep(0)
    cancelled.cancel()
    await bench.let_go()
    assert sums(await neighbour) == [5, 11]
    assert cancelled.cancelled()
    assert bench.one.ticks == [[5], [6]]


async def test_a_step_cancelled_during_its_tick_is_not_stepped_again(bench: Bench) -> None:
    bench.one.gate.clear()
    cancelled = bench.send(1, 2, 3)
    assert await asyncio.to_thread(bench.one.entered.wait, 10)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    bench.one.gate.set()
    assert sums(await bench.send(9)) == [9]
    assert bench.one.ticks == [[1], [9]]


class AtOnce:
    """A thread pool that runs its work where it stands, so that the order of events is known."""

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done

    def shutdown(self) -> None: ...


async def test_a_caller_cancelled_just_before_its_answer_leaves_the_loop_running(bench: Bench) -> None:
    bench.engine._thread = AtOnce()  # type: ignore[assignment]
    loop = asyncio.get_running_loop()
    caller = bench.send(1)
    bench.one.before_return = lambda: loop.call_soon(lambda: loop.call_soon(caller.cancel))
    await asyncio.wait([caller])
    assert caller.cancelled()
    bench.one.before_return = lambda: None
    assert sums(await asyncio.wait_for(bench.send(2), 10)) == [2]


async def test_the_loop_survives_an_executor_that_raises(bench: Bench) -> None:
    for _ in range(3):
        assert (await bench.send(RAISES)).failure
    assert sums(await bench.send(4)) == [4]


class Breaks(CountingMetrics):
    """Once, outside the executor."""

    def tick(self, model: ModelKey, sessions: int, duration_s: float) -> None:
        super().tick(model, sessions, duration_s)
        if len(self.events) == 1:
            raise MemoryError


@pytest.mark.parametrize("max_loop_tick_s", [0.0, 10.0])
async def test_a_tick_that_breaks_outside_the_executor_fails_its_steps_and_the_next_one_runs(
    max_loop_tick_s: float,
) -> None:
    engine = StepEngine({ONE: FakeExecutor()}, max_tick_sessions=4, metrics=Breaks(), max_loop_tick_s=max_loop_tick_s)
    state = engine.states(ONE).add(ZERO)
    async with asyncio.timeout(10):
        failed = await engine.step(ONE, column(1), state)
        assert isinstance(failed.failure, ExecutionFailed)
        assert sums(await engine.step(ONE, column(2), state)) == [2]
    engine.close()


async def test_steps_that_cannot_share_an_array_fail_and_the_next_tick_runs(bench: Bench) -> None:
    await bench.hold()
    state = bench.engine.states(ONE).add(ZERO)
    wide = asyncio.create_task(bench.engine.step(ONE, np.zeros((1, 2), np.float32), state))
    narrow = bench.send(1)
    await bench.let_go()
    async with asyncio.timeout(10):
        assert [type((await task).failure) for task in (wide, narrow)] == [ExecutionFailed] * 2
        assert sums(await bench.send(4)) == [4]


class Careless(TickJob):
    """Steps whose owner breaks when it is told what they gave."""

    dropped = False

    def applied(self, stepped: Stepped, start: int, end: int) -> None:
        raise RuntimeError("careless")

    def drop(self) -> None:
        self.dropped = True


async def test_an_owner_that_breaks_when_it_is_told_is_dropped_and_its_neighbours_get_their_answers(
    bench: Bench,
) -> None:
    await bench.hold()
    states = [bench.engine.states(ONE).add(ZERO) for _ in range(2)]
    careless = Careless(column(1, 2), in_turn=False, places=np.array([state.place for state in states]))
    bench.engine.submit(ONE, careless)
    neighbour = bench.send(5)
    await bench.let_go()
    async with asyncio.timeout(10):
        assert sums(await neighbour) == [5]
        assert sums(await bench.send(6)) == [6]
    assert careless.dropped


async def test_ticks_run_on_the_event_loop_while_they_are_short_and_in_a_thread_after_a_long_one() -> None:
    class Executor(FakeExecutor):
        def step(self, inputs: NDArray[np.generic], rows: Floats) -> tuple[Floats, Floats]:
            threads.append(threading.current_thread())
            time.sleep(inputs.max().item())
            return super().step(inputs, rows)

    threads: list[threading.Thread] = []
    executor = Executor()
    engine = StepEngine({ONE: executor}, max_tick_sessions=4, metrics=CountingMetrics(), max_loop_tick_s=0.05)
    here = threading.current_thread()
    for value in (0, 0, 0.1, 0, 0):
        await engine.step(ONE, column(value), engine.states(ONE).add(ZERO))
    engine.close()
    assert [thread is here for thread in threads] == [True, True, True, False, True]


async def test_the_event_loop_is_free_while_a_tick_runs(bench: Bench) -> None:
    bench.one.gate.clear()
    busy = bench.send(1)
    assert await asyncio.to_thread(bench.one.entered.wait, 10)
    assert not busy.done()
    bench.one.gate.set()
    assert sums(await busy) == [1]


async def test_the_thread_of_long_ticks_is_prepared_before_its_first_one() -> None:
    prepared = []
    executor = FakeExecutor()
    engine = StepEngine(
        {ONE: executor},
        max_tick_sessions=4,
        metrics=CountingMetrics(),
        max_loop_tick_s=0,
        prepare_thread=lambda: prepared.append((threading.current_thread().name, len(executor.ticks))),
    )
    await engine.step(ONE, column(1), engine.states(ONE).add(ZERO))
    engine.close()
    assert prepared == [("ticks_0", 0)]
