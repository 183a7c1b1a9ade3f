"""The client on an event loop: the same names, awaited."""

import asyncio
import signal
from collections.abc import AsyncIterator

import numpy as np
import pytest

from rnnserve import (
    AsyncClient,
    ModelNotFound,
    ModelNotStreamable,
    NotFinite,
    RnnserveError,
    StreamClosed,
    UnknownSymbol,
)
from rnnserve.tensors import Array
from tests.support.server import RunningServer


def recording(steps: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(steps, 3)).astype(np.float32)


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


async def whole(client: AsyncClient, x: Array) -> Array:
    """(steps, outputs): what the same network says about the whole sequence."""
    return (await client.predict("vanilla", [x], steps="all"))[0].outputs


async def test_models_samples_and_health_are_told(client: AsyncClient) -> None:
    assert [model.name for model in await client.models()].count("vanilla") == 2
    assert (await client.model("vanilla", version=1)).version == 1
    assert await client.samples("vanilla") == []
    assert (await client.health(), await client.health("text")) == ("serving", "serving")
    with pytest.raises(ModelNotFound):
        await client.health("nobody")


async def test_step_by_step_and_ahead_give_what_the_whole_sequence_gives(client: AsyncClient) -> None:
    x = recording(30)
    async with client.stream("vanilla") as stream:
        answers = [await stream.step(reading) for reading in x[:10]]
        answers += [answer async for answer in stream.steps([x[10], x[11:20], x[20:]])]
    assert [answer.step for answer in answers] == list(range(30))
    np.testing.assert_allclose([answer.output for answer in answers], await whole(client, x), atol=1e-5)


async def test_words_are_streamed_and_predicted_alike(client: AsyncClient) -> None:
    text = "The film is  NOT good, or\nso they say"
    async with client.stream("words") as stream:
        answers = [answer async for answer in stream.steps(text)]
    assert [answer.step for answer in answers] == list(range(9))
    whole = [prediction async for prediction in client.predict_many("words", [text], steps="all")]
    np.testing.assert_allclose([answer.output for answer in answers], whole[0].outputs, atol=1e-5)


async def test_many_streams_at_once_keep_their_states_apart(client: AsyncClient) -> None:
    async def listen(seed: int) -> Array:
        async with client.stream("vanilla") as stream:
            return [answer.output async for answer in stream.steps(recording(20, seed))][-1]

    outputs = await asyncio.gather(*map(listen, range(20)))
    expected = [(await whole(client, recording(20, seed)))[-1] for seed in range(20)]
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


async def test_no_answer_waits_for_the_next_input(client: AsyncClient) -> None:
    answered = asyncio.Event()

    async def sensor() -> AsyncIterator[Array]:
        yield recording(1)[0]
        await asyncio.wait_for(answered.wait(), 10)
        yield recording(1)[0]

    async with client.stream("vanilla") as stream:
        async for _ in stream.steps(sensor()):
            answered.set()
        assert stream.next_step == 2


async def test_a_refused_step_changes_nothing_and_can_be_sent_again(client: AsyncClient) -> None:
    x = recording(8)
    broken = x.copy()
    broken[4] = np.nan
    async with client.stream("vanilla") as stream:
        with pytest.raises(NotFinite):
            [answer async for answer in stream.steps(broken)]
        assert stream.next_step == 4
        answers = [answer async for answer in stream.steps(x[4:])]
    np.testing.assert_allclose(answers[-1].output, (await whole(client, x))[-1], atol=1e-5)


async def test_an_error_of_the_callers_own_comes_behind_the_answers(client: AsyncClient) -> None:
    async def failing() -> AsyncIterator[Array]:
        for reading in recording(3):
            yield reading
        raise KeyError("sensor")

    async with client.stream("vanilla") as stream:
        answers = stream.steps(failing())
        assert [(await anext(answers)).step for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError, match="sensor"):
            await anext(answers)
        assert (await stream.step(recording(1)[0])).step == 3


async def test_steps_left_half_way_leave_the_stream_usable(client: AsyncClient) -> None:
    async with client.stream("vanilla") as stream:
        async for answer in stream.steps(recording(100), ahead=16):
            if answer.step == 3:
                break
        following = await stream.step(recording(1)[0])
        assert 4 <= following.step <= 3 + 16 + 1
        await stream.reset()
        assert (await stream.step(recording(1)[0])).step == following.step + 1


async def test_a_network_that_reads_both_ways_is_refused(client: AsyncClient) -> None:
    with pytest.raises(ModelNotStreamable):
        async with client.stream("bidirectional"):
            pass


async def test_a_stream_outside_of_its_block_says_so(client: AsyncClient) -> None:
    stream = client.stream("vanilla")
    with pytest.raises(StreamClosed):
        await stream.step(recording(1)[0])


async def test_bulk_answers_come_in_order_from_either_kind_of_input(client: AsyncClient) -> None:
    inputs = [recording(1 + number % 5, number) for number in range(80)]

    async def asynchronous() -> AsyncIterator[Array]:
        for x in inputs:
            yield x

    expected = [prediction.output for prediction in await client.predict("bidirectional", inputs)]
    for source in (inputs, asynchronous()):
        outputs = [prediction.output async for prediction in client.predict_many("bidirectional", source)]
        np.testing.assert_allclose(outputs, expected, atol=1e-5)


async def test_bulk_errors_are_raised_or_returned(client: AsyncClient) -> None:
    results = [result async for result in client.predict_many("text", ["a", "x", "b"], errors="return")]
    assert [isinstance(result, RnnserveError) for result in results] == [False, True, False]
    with pytest.raises(UnknownSymbol) as refusal:
        [result async for result in client.predict_many("text", ["a", "x", "b"])]
    assert refusal.value.index == 1


async def test_the_reason_of_a_refused_bulk_is_told_whatever_is_being_written(client: AsyncClient) -> None:
    for _ in range(30):
        with pytest.raises(ModelNotFound):
            await anext(client.predict_many("nobody", [recording(1)] * 50))


async def test_a_cancelled_task_ends_its_stream_and_leaves_the_client_usable(client: AsyncClient) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[Array]:
        while True:
            yield recording(1)[0]
            begun.set()

    async def listen() -> None:
        async with client.stream("vanilla") as stream:
            async for _ in stream.steps(endless()):
                pass

    task = asyncio.create_task(listen())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await client.health() == "serving"
    others = {task.get_name() for task in asyncio.all_tasks()}
    assert not {name for name in others if name == "rnnserve-inputs"}


async def test_twelve_hundred_streams_that_come_at_once_are_all_served(server: RunningServer) -> None:
    async with AsyncClient(server.target, timeout_s=60.0) as client:
        await client.models()  # connected
        streams = [client.stream("vanilla") for _ in range(1_200)]
        server.process.send_signal(signal.SIGSTOP)
        opens = [asyncio.create_task(stream.open()) for stream in streams]
        await asyncio.wait(opens, timeout=0.5)  # they go out, and the server will see them all at once
        server.process.send_signal(signal.SIGCONT)
        await asyncio.gather(*opens)
        await asyncio.gather(*(stream.close() for stream in streams))
