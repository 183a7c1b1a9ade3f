"""A server that is gone, silent, full or going: the client says so in time and never hangs."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rnnserve import (
    AsyncClient,
    Client,
    Draining,
    MessageTooLarge,
    RetryPolicy,
    SessionLimit,
    TimedOut,
    TooManySteps,
    Unreachable,
)
from tests.support.server import RunningServer, start_server

STEP = [1.0, 2.0, 3.0]
ONCE = RetryPolicy(attempts=1)


@pytest.fixture(scope="module")
def small_server(repository: Path) -> Iterator[RunningServer]:
    """One with low limits, which may be paused."""
    with start_server(repository, max_streams=8, max_steps_per_message=5, max_message_bytes=2048) as running:
        yield running


@pytest.fixture
def doomed_server(repository: Path) -> Iterator[RunningServer]:
    """One that the test ends."""
    with start_server(repository, drain_timeout_s=0.5) as running:
        yield running


@pytest.fixture
def nobody() -> str:
    """A target where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def paused(server: RunningServer) -> Iterator[None]:
    """The server is there but does nothing."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_no_server_is_unreachable_for_every_kind_of_call(nobody: str) -> None:
    with Client(nobody, retry=ONCE) as client:
        with pytest.raises(Unreachable, match=nobody):
            client.models()
        with pytest.raises(Unreachable, match=nobody), client.stream("vanilla"):
            pass
        with pytest.raises(Unreachable, match=nobody):
            list(client.predict_many("vanilla", [[STEP]]))


async def test_no_server_is_unreachable_for_every_kind_of_awaited_call(nobody: str) -> None:
    async with AsyncClient(nobody, retry=ONCE) as client:
        with pytest.raises(Unreachable, match=nobody):
            await client.models()
        with pytest.raises(Unreachable, match=nobody):
            await client.stream("vanilla").open()
        with pytest.raises(Unreachable, match=nobody):
            await anext(client.predict_many("vanilla", [[STEP]]))


async def test_a_server_that_dies_ends_every_wait_for_answers(doomed_server: RunningServer) -> None:
    def source() -> Iterator[list[float]]:
        yield STEP
        threading.Event().wait()  # a sensor that never speaks again

    target = doomed_server.target
    async with AsyncClient(target, resume_timeout_s=0) as awaited, awaited.stream("vanilla") as awaited_stream:
        with Client(target, resume_timeout_s=0) as client, client.stream("vanilla") as stream:
            answers = stream.steps(source())
            assert next(answers).step == 0
            assert (await awaited_stream.step(STEP)).step == 0
            doomed_server.process.kill()
            with pytest.raises(Unreachable):
                next(answers)
            with pytest.raises(Unreachable):
                stream.step(STEP)
            with pytest.raises(Unreachable):
                await awaited_stream.step(STEP)


def test_a_silent_server_times_out_for_every_kind_of_call(small_server: RunningServer) -> None:
    with Client(small_server.target, timeout_s=0.5, resume_timeout_s=0) as client, client.stream("vanilla") as stream:
        stream.step(STEP)
        with paused(small_server):
            with pytest.raises(TimedOut, match=r"0\.5 s"):
                stream.step(STEP)
            with pytest.raises(TimedOut):
                client.models()
            with pytest.raises(TimedOut):
                list(client.predict_many("vanilla", [[STEP]]))
        with pytest.raises(TimedOut):  # the stream is over: whether its last step was applied is not known
            stream.step(STEP)


async def test_a_silent_server_times_out_for_every_kind_of_awaited_call(small_server: RunningServer) -> None:
    async with (
        AsyncClient(small_server.target, timeout_s=0.5, resume_timeout_s=0) as client,
        client.stream("vanilla") as stream,
    ):
        await stream.step(STEP)
        with paused(small_server):
            with pytest.raises(TimedOut, match=r"0\.5 s"):
                await stream.step(STEP)
            with pytest.raises(TimedOut):
                await client.models()


@contextmanager
def mute(port: int) -> Iterator[None]:
    """Connections are taken there, and nothing is ever said on them."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        yield


def test_a_stream_waits_no_longer_than_said_for_a_new_connection_that_is_mute(doomed_server: RunningServer) -> None:
    with (
        Client(doomed_server.target, timeout_s=0.5, resume_timeout_s=1) as client,
        client.stream("vanilla") as stream,
    ):
        stream.step(STEP)
        doomed_server.kill()
        with mute(doomed_server.port), pytest.raises(TimedOut, match=r"0\.5 s"):
            stream.step(STEP)


async def test_an_awaited_stream_waits_no_longer_than_said_for_a_new_connection_that_is_mute(
    doomed_server: RunningServer,
) -> None:
    async with (
        AsyncClient(doomed_server.target, timeout_s=0.5, resume_timeout_s=1) as client,
        client.stream("vanilla") as stream,
    ):
        await stream.step(STEP)
        doomed_server.kill()
        with mute(doomed_server.port), pytest.raises(TimedOut, match=r"0\.5 s"):
            await stream.step(STEP)


def test_a_slow_source_is_no_silent_server(server: RunningServer) -> None:
    with Client(server.target, timeout_s=0.3) as client, client.stream("vanilla") as stream:
        waiting = threading.Event()

        def source() -> Iterator[list[float]]:
            yield STEP
            waiting.wait(0.6)  # twice as long as the client waits for an answer
            yield STEP

        assert [answer.step for answer in stream.steps(source())] == [0, 1]


def test_limits_of_the_server_are_told_by_name(small_server: RunningServer) -> None:
    with Client(small_server.target) as client, client.stream("vanilla") as stream:
        with pytest.raises(TooManySteps):
            stream.step([STEP] * 6)
        with pytest.raises(MessageTooLarge):
            stream.step([STEP] * 200)
        assert stream.step(STEP).step == 0


def test_a_message_that_the_transport_refuses_is_too_large_by_name(small_server: RunningServer) -> None:
    with Client(small_server.target) as client, pytest.raises(MessageTooLarge, match="larger than max"):
        client.predict("text", ["a" * 2_000_000])


def test_one_session_too_many_is_told_when_to_come_back(small_server: RunningServer) -> None:
    with Client(small_server.target) as client, ExitStack() as streams:
        with pytest.raises(SessionLimit) as limit:
            deque((streams.enter_context(client.stream("vanilla")) for _ in range(9)), maxlen=0)
        assert (limit.value.retry_after_s or 0) > 0


def test_a_draining_server_gives_notice_and_then_a_reason(doomed_server: RunningServer) -> None:
    with Client(doomed_server.target, resume_timeout_s=0) as client, client.stream("vanilla") as stream:
        stream.step(STEP)
        doomed_server.terminate()
        with pytest.raises(Draining):
            deque((stream.step(STEP) for _ in itertools.count()), maxlen=0)
        assert [notice.reason for notice in stream.notices] == ["draining"]


@pytest.mark.parametrize("left_open", ["stream.step([1, 2, 3])", "next(stream.steps(iter([[1, 2, 3]] * 99)))"])
def test_a_program_that_forgets_to_close_still_exits(server: RunningServer, left_open: str) -> None:
    program = f"""
from rnnserve import Client
client = Client({server.target!r})
stream = client.stream("vanilla")
stream.open()
{left_open}
results = client.predict_many("bidirectional", [[[1, 2, 3]]] * 99)
next(results)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=20, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
