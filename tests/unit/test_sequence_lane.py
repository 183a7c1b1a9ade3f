import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle, load_bundle
from service.engine import lane_process
from service.engine.sequence_lane import SequenceLane
from service.errors import ExecutionFailed, LaneLost, QueueFull
from tests.support.fakes import CountingMetrics
from tests.support.reference import Reference, assert_close


def spawn() -> Executor:
    return lane_process.spawn(threads=1, niceness=0)


def make_lane(
    metrics: CountingMetrics, spawn: Callable[[], Executor] = spawn, *, max_queued: int = 8, max_batch: int = 4
) -> SequenceLane:
    return SequenceLane(spawn, max_queued=max_queued, max_batch=max_batch, max_batch_steps=100, metrics=metrics)


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    """One real process for all lanes here; a lane takes work only inside `running`."""
    process = spawn()
    yield process
    lane_process.end(process)


@pytest.fixture
def metrics() -> CountingMetrics:
    return CountingMetrics()


@pytest.fixture
def lane(process: Executor, metrics: CountingMetrics) -> SequenceLane:
    return make_lane(metrics, lambda: process)


@pytest.fixture(scope="module")
def vanilla(repository: Path) -> Bundle:
    return load_bundle(repository / "vanilla" / "1")


@pytest.fixture(scope="module")
def bidirectional(repository: Path) -> Bundle:
    return load_bundle(repository / "bidirectional" / "1")


@asynccontextmanager
async def running(lane: SequenceLane) -> AsyncIterator[None]:
    loop = asyncio.create_task(lane.run())
    try:
        yield
    finally:
        loop.cancel()


def sequence(steps: int, seed: int = 0, width: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(steps, width)).astype(np.float32)


def send(
    lane: SequenceLane, bundle: Bundle, *sequences: Any, wait: bool = False
) -> asyncio.Task[list[NDArray[np.float32]]]:
    return asyncio.create_task(lane.predict(bundle, list(sequences), wait=wait))


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def batches(metrics: CountingMetrics) -> list[tuple[str, int]]:
    return [(event[1].name, event[2]) for event in metrics.events if event[0] == "batch"]  # type: ignore[attr-defined, misc]


async def test_sequences_of_different_lengths_share_a_forward_and_keep_their_answers(
    lane: SequenceLane, vanilla: Bundle, metrics: CountingMetrics
) -> None:
    sequences = [sequence(steps, seed=steps) for steps in (5, 1, 9)]
    first, second = send(lane, vanilla, *sequences[:2]), send(lane, vanilla, sequences[2])
    await settle()
    async with running(lane):
        answers = [*await first, *await second]
    reference = Reference(vanilla.folder)
    for values, answer in zip(sequences, answers, strict=True):
        assert_close(answer, reference.predict(values))
    assert batches(metrics) == [("vanilla", 3)]


async def test_a_network_about_the_whole_sequence_answers_once(lane: SequenceLane, bidirectional: Bundle) -> None:
    sequences: list[NDArray[np.generic]] = [sequence(4), sequence(7, seed=1)]
    async with running(lane):
        answers = await lane.predict(bidirectional, sequences, wait=False)
    for values, answer in zip(sequences, answers, strict=True):
        assert answer.shape == (1, 2)
        assert_close(answer, Reference(bidirectional.folder).predict(values))


async def test_a_batch_has_one_model_and_takes_the_longest_waiting_first(
    lane: SequenceLane, vanilla: Bundle, bidirectional: Bundle, metrics: CountingMetrics
) -> None:
    tasks = [send(lane, bundle, sequence(2)) for bundle in (bidirectional, vanilla, bidirectional)]
    tasks.append(send(lane, vanilla, *[sequence(2)] * 5))
    await settle()
    async with running(lane):
        await asyncio.gather(*tasks)
    assert batches(metrics) == [("bidirectional", 2), ("vanilla", 4), ("vanilla", 2)]


async def test_a_batch_padded_to_its_longest_has_no_more_steps_than_it_may(
    lane: SequenceLane, vanilla: Bundle, metrics: CountingMetrics
) -> None:
    lengths = (40, 40, 40, 200, 3)
    answers = send(lane, vanilla, *[sequence(steps) for steps in lengths])
    await settle()
    async with running(lane):
        assert [len(answer) for answer in await answers] == list(lengths)
    assert batches(metrics) == [("vanilla", 2), ("vanilla", 1), ("vanilla", 1), ("vanilla", 1)]


async def test_a_full_queue_refuses_and_says_when_to_come_back(lane: SequenceLane, vanilla: Bundle) -> None:
    held = send(lane, vanilla, *[sequence(2)] * 7)
    await settle()
    with pytest.raises(QueueFull) as refusal:
        await lane.predict(vanilla, [sequence(2)] * 2, wait=False)
    assert refusal.value.metadata == {"limit": "8"}
    assert refusal.value.retry_after_s
    async with running(lane):
        assert len(await held) == 7
        assert len(await lane.predict(vanilla, [sequence(2)] * 2, wait=False)) == 2


async def test_a_caller_that_may_wait_gets_its_turn_when_there_is_room(lane: SequenceLane, vanilla: Bundle) -> None:
    held = send(lane, vanilla, *[sequence(2)] * 8)
    waiting = send(lane, vanilla, sequence(3), wait=True)
    await settle()
    assert len(lane._queue) == 8
    async with running(lane):
        assert len((await waiting)[0]) == 3
        await held


async def test_a_cancelled_caller_gives_its_place_back_and_is_not_computed(
    lane: SequenceLane, vanilla: Bundle, metrics: CountingMetrics
) -> None:
    cancelled, kept = send(lane, vanilla, *[sequence(2)] * 7), send(lane, vanilla, sequence(3))
    await settle()
    cancelled.cancel()
    await settle()
    async with running(lane):
        assert len((await kept)[0]) == 3
    assert batches(metrics) == [("vanilla", 1)]
    assert metrics.events[-1] == ("queued", 0)


async def test_a_cancelled_waiter_takes_no_place(lane: SequenceLane, vanilla: Bundle, metrics: CountingMetrics) -> None:
    held, waiting = send(lane, vanilla, *[sequence(2)] * 8), send(lane, vanilla, sequence(2), wait=True)
    await settle()
    waiting.cancel()
    async with running(lane):
        await held
    assert metrics.events[-1] == ("queued", 0)


async def test_only_the_guilty_sequence_of_a_batch_fails(
    lane: SequenceLane, vanilla: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    left, guilty, right = (send(lane, vanilla, values) for values in (sequence(4), sequence(4, width=5), sequence(6)))
    await settle()
    async with running(lane):
        assert (len((await left)[0]), len((await right)[0])) == (4, 6)
        with pytest.raises(ExecutionFailed) as failure:
            await guilty
    assert "size" not in failure.value.message
    assert "size" in caplog.text


async def test_what_still_waits_of_a_failed_request_is_not_computed(
    lane: SequenceLane, vanilla: Bundle, metrics: CountingMetrics
) -> None:
    failing = send(lane, vanilla, sequence(4, width=5), *[sequence(2)] * 7)
    await settle()
    async with running(lane):
        with pytest.raises(ExecutionFailed):
            await failing
        await lane.predict(vanilla, [sequence(3)], wait=False)
    assert sum(sequences for _, sequences in batches(metrics)) <= 3 + 1  # those that shared its batch, and the next


async def test_outputs_that_are_not_finite_fail_their_sequence_only(lane: SequenceLane, vanilla: Bundle) -> None:
    infinite = sequence(4)
    infinite[1] = np.inf
    guilty, neighbour = send(lane, vanilla, infinite), send(lane, vanilla, sequence(3))
    await settle()
    async with running(lane):
        assert np.isfinite((await neighbour)[0]).all()
        with pytest.raises(ExecutionFailed, match="not finite"):
            await guilty


async def test_a_killed_process_fails_only_what_it_held_and_another_takes_over(
    vanilla: Bundle, bidirectional: Bundle
) -> None:
    lane = make_lane(CountingMetrics())
    loop = asyncio.get_running_loop()
    await lane.warm_up([vanilla.folder])
    pid = await loop.run_in_executor(lane._process, os.getpid)
    os.kill(pid, signal.SIGSTOP)  # so that it is caught at work
    async with running(lane):
        held = send(lane, vanilla, sequence(4))
        await until(lambda: lane._in_flight == 1 and not lane._queue)
        waiting = send(lane, bidirectional, sequence(5))
        await until(lambda: len(lane._queue) == 1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LaneLost) as lost:
            await held
        assert lost.value.retry_after_s
        assert_close((await waiting)[0], Reference(bidirectional.folder).predict(sequence(5)))
        assert len((await lane.predict(vanilla, [sequence(4)], wait=False))[0]) == 4
    lane.close()


async def test_closing_ends_the_process_even_at_work(vanilla: Bundle) -> None:
    lane = make_lane(CountingMetrics())
    pid = await asyncio.get_running_loop().run_in_executor(lane._process, os.getpid)
    os.kill(pid, signal.SIGSTOP)
    async with running(lane):
        held = send(lane, vanilla, sequence(4))
        await until(lambda: lane._in_flight == 1 and not lane._queue)
    held.cancel()
    async with asyncio.timeout(10):
        await asyncio.to_thread(lane.close)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
