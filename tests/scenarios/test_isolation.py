"""No request delays beyond its share, changes or ends another's."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer
from tests.support.wire import (
    TIMEOUT_S,
    Refusal,
    Request,
    array,
    close,
    eventually,
    live_stream,
    metric,
    open_,
    predict,
    random_steps,
    reset,
    steps,
)

STREAMS = 64
STEPS = 25


def test_live_steps_are_answered_while_whole_sequences_are_computed(server: RunningServer, repository: Path) -> None:
    values = random_steps(50)
    with grpc.insecure_channel(server.target) as channel, live_stream(channel, open_("stacked", "beside")) as stream:
        long = SequenceServiceStub(channel).Predict.future(
            predict("bidirectional", [random_steps(20_000)] * 16), timeout=600
        )
        eventually(lambda: metric(server.metrics_url, "rnnserve_queued_sequences") == 16)
        outputs = np.concatenate([stream.step(row[np.newaxis]) for row in values])
        assert not long.done()
        assert metric(server.metrics_url, "rnnserve_queued_sequences") == 16
        long.cancel()
    assert_close(outputs, Reference(repository / "stacked" / "1").predict(values))


@pytest.fixture
async def live(server: RunningServer) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.target) as channel:
        yield RealTimeServiceStub(channel)


async def ask(call: Any, request: Request) -> Any:
    await call.write(request)
    return await call.read()


async def behave(live: Any, number: int) -> np.ndarray[Any, Any]:
    """One step after the other; the outputs about all of them."""
    call: Any = live.StreamSteps(timeout=TIMEOUT_S)
    await ask(call, open_("stacked", f"good-{number}"))
    outputs = []
    for t, row in enumerate(random_steps(STEPS, seed=number)):
        response = await ask(call, steps(t, row[np.newaxis]))
        outputs.append(array(response.answer.prediction.outputs))
    assert (await ask(call, close())).closed.next_step == STEPS
    assert await call.read() is grpc.aio.EOF
    return np.concatenate(outputs)


async def misbehave(live: Any, stop: asyncio.Event) -> list[str]:
    """Everything wrong, over and over; the reasons of the refusals of each round."""
    reasons = []
    while not stop.is_set():
        call: Any = live.StreamSteps(timeout=TIMEOUT_S)
        await ask(call, open_("stacked", "misbehaving"))
        bad = [
            Request(),
            steps(7, [[0, 0, 0]]),
            steps(0, [[0, 0]]),
            steps(0, "text"),
            steps(0, [[0, np.inf, 0]]),
            steps(0, np.zeros((1_025, 3))),
            steps(0, np.zeros((350_000, 3))),
            open_("stacked", "good-1"),
            reset(5),
        ]
        reasons.append(",".join([Refusal((await ask(call, request)).error).reason for request in bad]))
        await call.write(steps(0, random_steps(1_000)))
        call.cancel()
        thief: Any = live.StreamSteps(timeout=TIMEOUT_S)
        await thief.write(open_("stacked", f"good-{len(reasons) % STREAMS}"))
        thief.cancel()
        await asyncio.sleep(0)
    return reasons


async def test_of_64_streams_one_that_misbehaves_changes_no_other(live: Any, repository: Path) -> None:
    stop = asyncio.Event()
    bad = asyncio.create_task(misbehave(live, stop))
    outputs = await asyncio.gather(*(behave(live, number) for number in range(1, STREAMS)))
    stop.set()
    reference = Reference(repository / "stacked" / "1")
    for number, found in enumerate(outputs, start=1):
        assert_close(found, reference.predict(random_steps(STEPS, seed=number)))
    assert set(await bad) == {
        "FIELD_INVALID,STEP_OUT_OF_ORDER,SHAPE_MISMATCH,INPUT_KIND_MISMATCH,NOT_FINITE,TOO_MANY_STEPS,"
        "MESSAGE_TOO_LARGE,OPEN_REPEATED,STEP_OUT_OF_ORDER"
    }
