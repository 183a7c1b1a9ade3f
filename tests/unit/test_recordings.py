"""Sequences in parts through the lane, in its own process and over the socket of all workers."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from models.bundle import Bundle, load_bundle
from service.engine.recordings import Recording
from service.engine.remote_lane import LaneServer, RemoteLane
from service.engine.sequence_lane import Lane, SequenceLane
from service.engine.sequence_worker import ProcessWorker, ThreadWorker, Worker
from service.errors import ExecutionFailed, LaneLost, QueueFull
from tests.support.fakes import CountingMetrics
from tests.support.recordings import spilled_bytes
from tests.support.reference import Reference, assert_close
from tests.unit.test_sequence_lane import sequence, until

LONG = 20_000


def make_lane(worker: Callable[[], Worker]) -> SequenceLane:
    return SequenceLane(worker, max_queued=8, max_batch_steps=100, max_recordings=2, metrics=CountingMetrics())


@pytest.fixture
def lane(tmp_path: Path) -> SequenceLane:
    return make_lane(lambda: ThreadWorker(4, 1, load_bundle, spill_dir=tmp_path))


@pytest.fixture
def workers() -> list[ProcessWorker]:
    """Those that `process_lane` has begun."""
    return []


@pytest.fixture
def process_lane(workers: list[ProcessWorker], tmp_path: Path) -> Iterator[SequenceLane]:
    def begin() -> Worker:
        workers.append(ProcessWorker(4, 1, load_bundle, spill_dir=tmp_path))
        return workers[-1]

    lane = make_lane(begin)
    yield lane
    lane.close()


@asynccontextmanager
async def remote(lane: SequenceLane, find: Callable[[str, int], Bundle], folder: Path) -> AsyncIterator[RemoteLane]:
    """The lane as a worker sees it, which dies in the end."""
    server = await LaneServer(lane, find).serve(folder / "lane")
    far = RemoteLane(folder / "lane", max_waiting=1)
    running = asyncio.create_task(far.run())
    try:
        yield far
    finally:
        running.cancel()
        far.close()
        server.close()


@pytest.fixture(scope="module")
def bidirectional(repository: Path) -> Bundle:
    return load_bundle(repository / "bidirectional" / "1")


@pytest.fixture(scope="module")
def stacked(repository: Path) -> Bundle:
    return load_bundle(repository / "stacked" / "1")


async def record(lane: Lane, bundle: Bundle, *parts: NDArray[np.float32]) -> Recording:
    recording = await lane.record(bundle, wait=False)
    for part in parts:
        await recording.store(part)
    return recording


async def answer(recording: Recording) -> NDArray[np.float32]:
    pieces = []
    while True:
        outputs, more = await recording.read(50, last_only=False)
        if outputs is not None:
            pieces.append(outputs)
        if not more:
            return np.concatenate(pieces)


async def in_parts(lane: Lane, bundle: Bundle, values: NDArray[np.float32], *cuts: int) -> NDArray[np.float32]:
    recording = await record(lane, bundle, *np.split(values, cuts))
    try:
        await recording.compute()
        return await answer(recording)
    finally:
        recording.close()


async def begun(recording: Recording) -> asyncio.Task[None]:
    """It is computed by now, and will be for long."""
    computing = asyncio.create_task(recording.compute())
    while not (await recording.progress()).total_steps:
        pass
    return computing


async def refused(work: Awaitable[object], kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        await work


async def test_a_recording_is_answered_as_the_same_sequence_whole(
    lane: SequenceLane, bidirectional: Bundle, stacked: Bundle, tmp_path: Path
) -> None:
    for bundle in (bidirectional, stacked):
        assert_close(
            await in_parts(lane, bundle, sequence(130), 1, 77), Reference(bundle.folder).predict(sequence(130))
        )
    await until(lambda: spilled_bytes(tmp_path) == 0)


async def test_it_is_so_through_the_process_of_all_workers(
    lane: SequenceLane, bidirectional: Bundle, stacked: Bundle, tmp_path: Path
) -> None:
    bundles = {bundle.manifest.name: bundle for bundle in (bidirectional, stacked)}
    async with remote(lane, lambda name, _: bundles[name], tmp_path) as far:
        for bundle in bundles.values():
            answers = await in_parts(far, bundle, sequence(130), 1, 77)
            assert_close(answers, Reference(bundle.folder).predict(sequence(130)))
        await until(lambda: spilled_bytes(tmp_path) == 0)


async def test_a_short_sequence_is_not_held_up_by_a_recording_that_takes_long(
    lane: SequenceLane, stacked: Bundle
) -> None:
    recording = await record(lane, stacked, sequence(LONG))
    computing = await begun(recording)
    sending = asyncio.create_task(lane.run())
    answers = await lane.predict(stacked, [sequence(60), sequence(30)], wait=False)
    assert not computing.done()
    assert [len(outputs) for outputs in answers] == [60, 30]
    progress = await recording.progress()
    assert 0 < progress.computed_steps < progress.total_steps == LONG
    computing.cancel()
    sending.cancel()
    recording.close()


async def test_there_are_no_more_of_them_than_may_be(lane: SequenceLane, stacked: Bundle) -> None:
    first, second = await record(lane, stacked, sequence(3)), await record(lane, stacked)
    with pytest.raises(QueueFull) as refusal:
        await lane.record(stacked, wait=False)
    assert refusal.value.metadata == {"limit": "2"}
    assert refusal.value.retry_after_s
    waiting = asyncio.create_task(lane.record(stacked, wait=True))
    second.close()
    second.close()
    third = await waiting
    await refused(lane.record(stacked, wait=False), QueueFull)
    first.close()
    third.close()


async def test_a_caller_that_waits_no_longer_takes_no_place(lane: SequenceLane, stacked: Bundle) -> None:
    held = [await record(lane, stacked), await record(lane, stacked)]
    waiting = asyncio.create_task(lane.record(stacked, wait=True))
    await asyncio.sleep(0)
    waiting.cancel()
    await refused(waiting, asyncio.CancelledError)
    for recording in held:
        recording.close()
    for recording in [await record(lane, stacked), await record(lane, stacked)]:
        recording.close()


async def test_a_recording_that_fails_is_refused_and_the_others_go_on(lane: SequenceLane, stacked: Bundle) -> None:
    failing, good = await record(lane, stacked), await record(lane, stacked, sequence(9))
    with pytest.raises(ExecutionFailed) as failure:
        await failing.store(sequence(4, width=5))
    assert "size" not in failure.value.message
    await good.compute()
    assert len(await answer(good)) == 9
    failing.close()
    good.close()


async def test_closing_a_recording_at_work_frees_its_files_at_once(
    process_lane: SequenceLane, workers: list[ProcessWorker], stacked: Bundle, tmp_path: Path
) -> None:
    recording = await record(process_lane, stacked, sequence(LONG))
    computing = await begun(recording)
    assert spilled_bytes(tmp_path, workers[0].pid) > 500_000
    computing.cancel()
    recording.close()
    after = await record(process_lane, stacked)  # by then the worker has heard of it
    assert spilled_bytes(tmp_path, workers[0].pid) == 0
    after.close()


async def test_a_worker_that_dies_loses_the_recordings_that_it_had_and_no_others(
    process_lane: SequenceLane, workers: list[ProcessWorker], stacked: Bundle
) -> None:
    computed, storing = await record(process_lane, stacked, sequence(LONG)), await record(process_lane, stacked)
    computing = await begun(computed)
    os.kill(workers[0].pid, signal.SIGKILL)
    await refused(computing, LaneLost)
    await refused(storing.store(sequence(3)), LaneLost)
    computed.close()
    storing.close()
    assert len(await in_parts(process_lane, stacked, sequence(9), 4)) == 9
    assert len(workers) == 2


async def test_a_service_that_dies_leaves_nothing_in_the_process_of_all_workers(
    lane: SequenceLane, stacked: Bundle, tmp_path: Path
) -> None:
    async with remote(lane, lambda *_: stacked, tmp_path) as far:
        computed, storing = await record(far, stacked, sequence(LONG)), await record(far, stacked, sequence(3))
        computing = await begun(computed)
        assert (await computed.progress()).total_steps == LONG
        assert (await storing.progress()) == (3, 0, 0)
        waiting = asyncio.create_task(far.record(stacked, wait=True))
        await until(lambda: bool(lane._recordings._places._waiters))
    async with asyncio.timeout(10):
        for recording in [await lane.record(stacked, wait=True), await lane.record(stacked, wait=True)]:
            recording.close()
    await until(lambda: spilled_bytes(tmp_path) == 0)
    await refused(asyncio.wait_for(storing.store(sequence(3)), 5), LaneLost)
    for task in (computing, waiting):
        task.cancel()


async def test_a_caller_that_gives_up_at_the_process_of_all_workers_gives_its_place_back(
    lane: SequenceLane, stacked: Bundle, tmp_path: Path
) -> None:
    async with remote(lane, lambda *_: stacked, tmp_path) as far:
        held = [await record(far, stacked), await record(far, stacked)]
        waiting = asyncio.create_task(far.record(stacked, wait=True))
        await until(lambda: bool(lane._recordings._places._waiters))
        waiting.cancel()
        await refused(waiting, asyncio.CancelledError)
        for recording in held:
            recording.close()
        for recording in [await far.record(stacked, wait=True), await far.record(stacked, wait=True)]:
            recording.close()
