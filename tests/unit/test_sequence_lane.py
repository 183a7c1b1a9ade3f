import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle, BundleError, load_bundle
from service.engine.sequence_engine import Ended
from service.engine.sequence_lane import SequenceLane
from service.engine.sequence_worker import Abandon, Begin, News, Order, ProcessWorker, ThreadWorker, Worker
from service.errors import ExecutionFailed, LaneLost, QueueFull
from tests.support.fakes import CountingMetrics
from tests.support.reference import Reference, assert_close
from tests.support.server import ROOT


def thread() -> Worker:
    return ThreadWorker(4, 1, load_bundle)


def process() -> Worker:
    return ProcessWorker(4, 1, load_bundle, niceness=0)


def make_lane(
    metrics: CountingMetrics, worker: Callable[[], Worker], *, max_queued: int = 8, max_batch_steps: int = 100
) -> SequenceLane:
    return SequenceLane(
        worker, max_queued=max_queued, max_batch_steps=max_batch_steps, max_recordings=2, metrics=metrics
    )


@pytest.fixture
def metrics() -> CountingMetrics:
    return CountingMetrics()


@pytest.fixture
def lane(metrics: CountingMetrics) -> SequenceLane:
    """It sends work only inside `running`."""
    return make_lane(metrics, thread)


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
    assert {model for model, _ in batches(metrics)} == {"vanilla"}
    assert [event for event in metrics.events if event[0] == "sequence"] == [("sequence", vanilla.manifest.key)] * 3


async def test_a_network_about_the_whole_sequence_answers_once(lane: SequenceLane, bidirectional: Bundle) -> None:
    sequences: list[NDArray[np.generic]] = [sequence(4), sequence(7, seed=1)]
    async with running(lane):
        answers = await lane.predict(bidirectional, sequences, wait=False)
    for values, answer in zip(sequences, answers, strict=True):
        assert answer.shape == (1, 2)
        assert_close(answer, Reference(bidirectional.folder).predict(values))


async def test_models_share_no_tick(
    lane: SequenceLane, vanilla: Bundle, bidirectional: Bundle, metrics: CountingMetrics
) -> None:
    tasks = [send(lane, bundle, sequence(2)) for bundle in (bidirectional, vanilla, bidirectional)]
    await settle()
    async with running(lane):
        await asyncio.gather(*tasks)
    computed = [model for model, sequences in batches(metrics) for _ in range(sequences)]
    assert (computed.count("vanilla"), computed.count("bidirectional")) == (1, 2 * 2)  # two directions


async def test_ticks_of_a_long_sequence_are_told_of_while_it_is_computed(
    lane: SequenceLane, vanilla: Bundle, metrics: CountingMetrics
) -> None:
    async with running(lane):
        answer = send(lane, vanilla, sequence(300_000))
        await until(lambda: len(batches(metrics)) > 0)
        assert ("sequence", vanilla.manifest.key) not in metrics.events
        answer.cancel()


async def test_no_more_steps_are_under_way_than_may_be_but_for_a_longer_sequence_alone(
    lane: SequenceLane, vanilla: Bundle, metrics: CountingMetrics
) -> None:
    lengths = (60, 40, 1, 99, 200, 3)
    answers = send(lane, vanilla, *[sequence(steps) for steps in lengths])
    await settle()
    async with running(lane):
        assert [len(answer) for answer in await answers] == list(lengths)
    assert {sequences for _, sequences in batches(metrics)} <= {1, 2}


class HeldWorker:
    """Ends a sequence when it is told to."""

    def __init__(self) -> None:
        self.under_way: list[Begin] = []
        self.abandoned: list[int] = []

    def listen(self, hear: Callable[[News], None], died: Callable[[], None]) -> None:
        self._hear = hear

    def send(self, order: Order) -> None:
        match order:
            case Begin():
                self.under_way.append(order)
            case Abandon(number):
                self.abandoned.append(number)

    def lengths(self) -> list[int]:
        return [len(begun.sequence) for begun in self.under_way]

    def finish(self, steps: int) -> list[int]:
        """One of so many steps; who is under way then."""
        begun = self.under_way.pop(self.lengths().index(steps))
        self._hear(Ended(begun.number, np.zeros((1, 2), np.float32)))
        return self.lengths()

    def end(self) -> None:
        pass


async def test_short_sequences_pass_a_long_one_without_memory_but_not_for_ever(vanilla: Bundle) -> None:
    worker = HeldWorker()
    lane = make_lane(CountingMetrics(), lambda: worker)  # 100 steps at a time
    answers = send(lane, vanilla, *[sequence(steps) for steps in (60, 70, 39, 61, 20, 99)])
    await settle()
    async with running(lane):
        await settle()
        assert worker.lengths() == [60, 39]
        assert worker.finish(39) == [60, 20]  # 61 has no room, 20 has
        assert worker.finish(60) == [20, 70]  # the first in the queue, as soon as there is room
        assert worker.finish(20) == [70]
        assert worker.finish(70) == [61]
        assert worker.finish(61) == [99]
        worker.finish(99)
        await answers


async def test_no_more_steps_pass_a_long_sequence_than_may_be_under_way(vanilla: Bundle) -> None:
    worker = HeldWorker()
    lane = make_lane(CountingMetrics(), lambda: worker)
    answers = send(lane, vanilla, *[sequence(steps) for steps in (10, 200, 50, 49, 30)])
    await settle()
    async with running(lane):
        await settle()
        assert worker.lengths() == [10, 50, 30]
        assert worker.finish(50) == [10, 30]  # there is room for 49, but 129 steps would have passed
        assert worker.finish(30) == [10]
        assert worker.finish(10) == [200]
        assert worker.finish(200) == [49]
        worker.finish(49)
        await answers


async def test_short_sequences_have_memory_of_their_own_while_long_ones_wait_and_leave_them_theirs(
    vanilla: Bundle,
) -> None:
    worker = HeldWorker()
    lane = make_lane(
        CountingMetrics(), lambda: worker, max_queued=1_000, max_batch_steps=1_024
    )  # 4 are short, 128 kept
    long = send(lane, vanilla, *[sequence(steps) for steps in (500, 1_000)])
    await settle()
    async with running(lane):
        await settle()
        short = send(lane, vanilla, *[sequence(4)] * 40)
        await settle()
        assert worker.lengths() == [500, *[4] * 32]
        assert worker.finish(500) == [*[4] * 32, 1_000, *[4] * 6]  # no long one waits any more
        for steps in [1_000, *[4] * 40]:
            worker.finish(steps)
        await asyncio.gather(long, short)


async def test_one_that_is_cancelled_is_computed_no_further(vanilla: Bundle) -> None:
    worker = HeldWorker()
    lane = make_lane(CountingMetrics(), lambda: worker)
    cancelled, kept = send(lane, vanilla, sequence(60)), send(lane, vanilla, sequence(40))
    waiting = send(lane, vanilla, sequence(50))
    async with running(lane):
        await settle()
        cancelled.cancel()
        await settle()
        assert worker.abandoned == [worker.under_way[0].number]
        assert worker.lengths() == [60, 40, 50]
        for steps in (40, 50):
            worker.finish(steps)
        await asyncio.gather(kept, waiting)


async def test_the_first_in_the_queue_being_cancelled_leaves_those_behind_it_as_patient_as_before(
    vanilla: Bundle,
) -> None:
    worker = HeldWorker()
    lane = make_lane(CountingMetrics(), lambda: worker)
    held = send(lane, vanilla, sequence(10))
    first = send(lane, vanilla, sequence(200))
    passing = send(lane, vanilla, sequence(90))
    async with running(lane):
        await settle()
        assert worker.finish(90) == [10]
        first.cancel()
        others = send(lane, vanilla, *[sequence(steps) for steps in (150, 80)])
        await settle()
        assert worker.lengths() == [10, 80]  # 170 steps would have passed the one that is gone
        for steps in (80, 10, 150):
            worker.finish(steps)
        await asyncio.gather(held, passing, others)


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
    assert len(lane._long) == 8
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


async def test_what_is_left_of_a_failed_request_is_not_computed(
    lane: SequenceLane, vanilla: Bundle, metrics: CountingMetrics
) -> None:
    failing = send(lane, vanilla, sequence(4, width=5), *[sequence(90)] * 7)  # of which one fits at a time
    await settle()
    async with running(lane):
        with pytest.raises(ExecutionFailed):
            await failing
        await lane.predict(vanilla, [sequence(3)], wait=False)
    assert len([event for event in metrics.events if event[0] == "sequence"]) <= 2


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
    workers: list[ProcessWorker] = []

    def begin() -> Worker:
        workers.append(ProcessWorker(4, 1, load_bundle, niceness=0))
        return workers[-1]

    metrics = CountingMetrics()
    lane = make_lane(metrics, begin)
    await lane.warm_up([vanilla.folder])
    os.kill(workers[0].pid, signal.SIGSTOP)  # so that it is caught at work
    async with running(lane):
        held = [send(lane, vanilla, sequence(60)), send(lane, bidirectional, sequence(40))]
        await until(lambda: lane._in_flight == 2 and not lane._long)
        waiting = send(lane, bidirectional, sequence(5))
        await until(lambda: len(lane._long) == 1)
        os.kill(workers[0].pid, signal.SIGKILL)
        for lost in held:
            with pytest.raises(LaneLost) as failure:
                await lost
            assert failure.value.retry_after_s
        assert_close((await waiting)[0], Reference(bidirectional.folder).predict(sequence(5)))
        assert len((await lane.predict(vanilla, [sequence(4)], wait=False))[0]) == 4
    assert len(workers) == 2
    assert metrics.events.count(("lane died",)) == 1
    lane.close()


async def test_closing_ends_the_process_even_at_work(vanilla: Bundle) -> None:
    worker = ProcessWorker(4, 1, load_bundle, niceness=0)
    lane = make_lane(CountingMetrics(), lambda: worker)
    await lane.warm_up([vanilla.folder])
    os.kill(worker.pid, signal.SIGSTOP)
    async with running(lane):
        held = send(lane, vanilla, sequence(4))
        await until(lambda: lane._in_flight == 1 and not lane._long)
    held.cancel()
    async with asyncio.timeout(10):
        await asyncio.to_thread(lane.close)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def begin_a_process_and_exit() -> None:
    worker = process()
    worker.send(Abandon(0))
    worker.end()
    os._exit(0)


def test_a_service_that_exits_at_once_leaves_nothing_of_the_process_behind() -> None:
    run = f"import {__name__} as this; this.{begin_a_process_and_exit.__name__}()"
    ended = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")  # multiprocessing complains of what is left


async def test_a_bundle_that_cannot_be_loaded_is_told_and_the_others_go_on(
    vanilla: Bundle, tmp_path: Path, metrics: CountingMetrics
) -> None:
    lane = make_lane(metrics, process)
    with pytest.raises(BundleError):
        await lane.warm_up([tmp_path])
    async with running(lane):
        assert len((await lane.predict(vanilla, [sequence(4)], wait=False))[0]) == 4
    lane.close()
