"""What happens on a multiplexed stream while a tick is under way: the executor waits at its gate."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from models.manifest import Manifest, ModelKey
from models.recurrent import NetworkSpec
from rnnserve.v1.real_time_service_pb2 import MultiplexStepsResponse
from service.api.calls import Refusals
from service.api.limits import Limits
from service.api.multiplexed_stream import MultiplexedStream
from service.api.openings import Openings
from service.api.outbox import MAX_UNWRITTEN
from service.engine.step_engine import StepEngine
from service.metrics import Metrics
from service.sessions.limits import SessionLimits
from service.sessions.record import SessionKey
from service.sessions.registry import Opening, SessionRegistry
from service.tracing import Timing
from tests.support.bundles import features, manifest
from tests.support.fakes import RAISES, TURNS_NAN, CountingMetrics, FakeExecutor, FakeStore, FakeStream
from tests.support.multiplexed import Request, close_handle, open_handle, reset_handle, step_each
from tests.support.wire import array

MODEL = ModelKey("sums", 1)
MANIFEST = manifest("sums", NetworkSpec(cell="tanh", features=1, hidden_size=1, outputs=1), features(1))
TOKEN = b"0123456789abcdef"
AHEAD = MANIFEST.model_copy(update={"look_ahead": 2})
LIMITS = Limits(
    max_message_bytes=1_000_000,
    max_steps_per_message=100,
    max_outstanding_steps=3,
    max_sequence_steps=1,
    max_queued_sequences=1,
    max_recording_steps=1,
    part_timeout_s=0,
    max_bulk_sequences=1,
    idle_timeout_s=0.0,
)


class Context:
    """Of a call: what is written waits to be read here; while `gate` is shut, nobody takes it."""

    def __init__(self) -> None:
        self.written: asyncio.Queue[MultiplexStepsResponse] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, response: MultiplexStepsResponse) -> None:
        await self.gate.wait()
        await self.written.put(response)


class Served:
    """A stream over a registry of sums, and its other end."""

    def __init__(self, manifest: Manifest = MANIFEST) -> None:
        self.manifest = manifest
        self.timings: list[tuple[Timing, int]] = []  # and of how many sessions
        self.executor = FakeExecutor()
        self.engine = StepEngine({MODEL: self.executor}, max_tick_sessions=4, metrics=Metrics(), max_loop_tick_s=0)
        self.metrics = Metrics()
        self.sessions = SessionRegistry(
            self.engine,
            FakeStore(),
            {MODEL: manifest},
            SessionLimits(
                max_streams=100, max_sessions=100, max_sessions_per_tenant=0, max_parked_bytes=0,
                max_held_bytes=10_000, resume_window_s=100.0, idle_timeout_s=0.0, max_age_s=0.0,
            ),
            checkpoint_interval_s=1.0,
            checkpoint_steps=0,
            store_timeout_s=0.25,
            metrics=CountingMetrics(),
        )  # fmt: skip
        self.context = Context()
        self.requests: asyncio.Queue[Request | None] = asyncio.Queue()
        self.taken = 0
        self.another_taken = asyncio.Event()
        self.serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        catalog: Any = SimpleNamespace(find=lambda *_: SimpleNamespace(manifest=self.manifest))
        context: Any = self.context
        tracing: Any = SimpleNamespace(
            samples_steps=lambda: True, steps=lambda _, timing, sessions: self.timings.append((timing, sessions))
        )
        stream = MultiplexedStream(
            context,
            Openings(catalog, self.sessions, LIMITS),
            self.sessions,
            LIMITS,
            Refusals(self.metrics),
            self.metrics,
            tracing,
        )
        try:
            await stream.serve(self._each_request())
        finally:
            stream.leave()

    async def _each_request(self) -> AsyncIterator[Request]:
        while (request := await self.requests.get()) is not None:
            yield request
            self.taken += 1
            self.another_taken.set()
            self.requests.task_done()

    def send(self, *requests: Request) -> None:
        for request in requests:
            self.requests.put_nowait(request)

    async def read(self) -> MultiplexStepsResponse:
        return await asyncio.wait_for(self.context.written.get(), 10)

    async def close(self) -> None:
        self.executor.gate.set()
        self.context.gate.set()
        self.serving.cancel()
        await asyncio.wait([self.serving])
        self.engine.close()

    async def open(self, *handles: int) -> None:
        for handle in handles:
            self.send(open_handle(handle, "sums", f"s{handle}", token=TOKEN))
            assert (await self.read()).opened.handle == handle

    async def answers(self, steps: int) -> dict[tuple[int, int], float]:
        """Sums by handle and step."""
        found: dict[tuple[int, int], float] = {}
        while len(found) < steps:
            response = await self.read()
            assert response.HasField("answer"), response
            sums = array(response.answer.prediction.outputs)[:, 0].tolist()
            found |= dict(
                zip(zip(response.answer.handles, response.answer.first_steps, strict=True), sums, strict=True)
            )
        return found

    async def hold(self, *handles: int) -> None:
        """Let a tick of a first step of each handle wait."""
        self.executor.gate.clear()
        self.executor.entered.clear()
        self.send(step_each(dict.fromkeys(handles, 0), [[1.0]] * len(handles)))
        assert await asyncio.to_thread(self.executor.entered.wait, 10)

    async def take_all(self) -> None:
        """Wait until the server has taken what was sent."""
        await self.requests.join()

    def sum_of(self, handle: int) -> tuple[int, float]:
        """The session's next step and its state."""
        record = self.sessions._table.in_memory[SessionKey("", f"s{handle}")].record()
        return record.next_step, float(record.row[0])


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    yield served
    await served.close()


async def test_steps_that_wait_for_the_one_under_way_follow_in_order(served: Served) -> None:
    await served.open(0, 1)
    await served.hold(0, 1)
    served.send(step_each({0: 1, 1: 1}, [[2.0], [3.0]]), step_each({1: 2}, [[4.0]]))
    await served.take_all()
    served.executor.gate.set()
    assert await served.answers(5) == {(0, 0): 1, (1, 0): 1, (0, 1): 3, (1, 1): 4, (1, 2): 8}
    assert served.executor.ticks == [[1, 1], [2, 3], [4]]


async def test_a_step_that_waits_for_the_one_before_it_is_timed_from_when_it_came(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock_s, durations_s = 0.0, list[float]()
    monkeypatch.setattr(
        "service.api.multiplexed_stream.time", SimpleNamespace(time=lambda: 0.0, perf_counter=lambda: clock_s)
    )
    monkeypatch.setattr(served.metrics, "steps_answered", lambda _model, duration_s, _: durations_s.append(duration_s))
    await served.open(0)
    await served.hold(0)
    clock_s = 10.0
    served.send(step_each({0: 1}, [[2.0]]))
    await served.take_all()
    clock_s = 100.0
    served.executor.gate.set()
    await served.answers(2)
    assert durations_s == [100.0, 90.0]


async def test_a_step_that_is_not_answered_is_not_timed(served: Served) -> None:
    await served.open(0, 1)
    await served.hold(0)
    await served.sessions.open(Opening(SessionKey("", "s0"), TOKEN, resume=True), MANIFEST, FakeStream())
    assert list((await served.read()).ended.handles) == [0]
    served.executor.gate.set()
    served.send(step_each({1: 0}, [[RAISES]]))
    assert (await served.read()).HasField("refused")
    served.send(step_each({1: 0}, [[1.0]]))
    await served.answers(1)
    about_model = {"model": MODEL.name, "version": str(MODEL.version)}
    assert served.metrics.registry.get_sample_value("rnnserve_step_seconds_count", about_model) == 1


async def test_each_tick_of_a_message_has_its_own_parts_and_waits_for_those_before_it(served: Served) -> None:
    await served.open(0, 1, 2, 3, 4, 5)
    served.send(step_each(dict.fromkeys(range(6), 0), [[1.0]] * 6))  # a tick has four
    await served.answers(6)
    (first, of_first), (second, of_second) = served.timings
    assert (of_first, of_second) == (4, 2)
    assert first.start_s == second.start_s
    assert second.waited_s >= first.waited_s + first.computed_s
    for timing in (first, second):
        assert timing.start_s + timing.waited_s + timing.computed_s <= timing.sent_s


async def test_one_more_step_than_may_be_outstanding_is_refused_and_those_are_answered(served: Served) -> None:
    await served.open(0, 1)
    await served.hold(0)
    served.send(*(step_each({0: step, 1: step - 1}, [[2.0], [1.0]]) for step in (1, 2, 3)))
    response = await served.read()
    assert (list(response.refused.handles), list(response.refused.first_steps)) == ([0], [3])
    assert "QUEUE_FULL" in str(response.refused.error)
    served.executor.gate.set()
    answers = await served.answers(6)
    assert {key: total for key, total in answers.items() if key[0] == 0} == {(0, 0): 1, (0, 1): 3, (0, 2): 5}
    served.send(step_each({0: 3}, [[2.0]]))
    assert await served.answers(1) == {(0, 3): 7}


async def test_handles_that_have_their_answers_do_not_wait_for_those_that_have_not(served: Served) -> None:
    await served.open(0, 1, 2, 3, 4, 5)
    served.send(step_each(dict.fromkeys(range(6), 0), [[1.0]] * 6))
    first, second = await served.read(), await served.read()
    assert (list(first.answer.handles), list(second.answer.handles)) == ([0, 1, 2, 3], [4, 5])  # a tick has four


@pytest.mark.parametrize("bad", [RAISES, TURNS_NAN])
async def test_a_step_that_fails_is_refused_alone_and_its_session_stays_as_it_was(served: Served, bad: float) -> None:
    await served.open(0, 1, 2)
    served.send(step_each({0: 0, 1: 0, 2: 0}, [[1.0], [bad], [3.0]]))
    assert await served.answers(2) == {(0, 0): 1, (2, 0): 3}
    refused = (await served.read()).refused
    assert (list(refused.handles), list(refused.first_steps), list(refused.next_steps)) == ([1], [0], [0])
    assert "EXECUTION_FAILED" in str(refused.error)
    served.send(step_each({0: 1, 1: 0}, [[1.0], [5.0]]))
    assert await served.answers(2) == {(0, 1): 2, (1, 0): 5}


async def test_steps_behind_one_that_fails_are_refused_too(served: Served) -> None:
    await served.open(0)
    await served.hold(0)
    served.send(step_each({0: 1}, [[RAISES]]), step_each({0: 2}, [[1.0]]))
    await served.take_all()
    served.executor.gate.set()
    await served.answers(1)
    refusals = [(await served.read()).refused for _ in range(2)]
    assert [list(refused.first_steps) for refused in refusals] == [[1], [2]]
    assert ["EXECUTION_FAILED" in str(refusals[0].error), "STEP_OUT_OF_ORDER" in str(refusals[1].error)] == [True, True]
    assert served.sum_of(0) == (1, 1)


async def test_a_session_taken_over_during_its_step_drops_it_and_its_neighbours_keep_theirs(served: Served) -> None:
    await served.open(0, 1)
    await served.hold(0, 1)
    session, _ = await served.sessions.open(Opening(SessionKey("", "s0"), TOKEN, resume=True), MANIFEST, FakeStream())
    ended = (await served.read()).ended
    assert (list(ended.handles), "SESSION_MOVED" in str(ended.error)) == ([0], True)
    served.executor.gate.set()
    assert await served.answers(1) == {(1, 0): 1}
    assert (session.next_step, session.record().row.tolist()) == (0, [0])
    assert served.sum_of(1) == (1, 1)


async def test_a_reset_waits_for_the_step_before_it(served: Served) -> None:
    await served.open(0)
    await served.hold(0)
    served.send(reset_handle(0, 1), step_each({0: 1}, [[7.0]]))
    await served.take_all()
    served.executor.gate.set()
    assert await served.answers(1) == {(0, 0): 1}
    assert (await served.read()).reset.next_step == 1
    assert await served.answers(1) == {(0, 1): 7}


async def test_a_close_waits_for_the_step_before_it(served: Served) -> None:
    await served.open(0)
    await served.hold(0)
    served.send(close_handle(0, 1))
    await served.take_all()
    served.executor.gate.set()
    assert await served.answers(1) == {(0, 0): 1}
    assert (await served.read()).closed.closed.next_step == 1


async def test_a_client_that_does_not_read_is_not_read_from_either(served: Served) -> None:
    await served.open(0)
    served.context.gate.clear()
    bad = step_each({0: 99}, [[1.0]])
    served.send(*[bad] * (3 * MAX_UNWRITTEN))
    async with asyncio.timeout(10):
        while served.taken < MAX_UNWRITTEN:
            served.another_taken.clear()
            await served.another_taken.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert served.taken <= MAX_UNWRITTEN + 2
    served.context.gate.set()
    for _ in range(3 * MAX_UNWRITTEN):
        assert (await served.read()).HasField("refused")


async def test_what_is_under_way_when_the_call_ends_is_dropped_and_the_sessions_stay_as_they_were(
    served: Served,
) -> None:
    await served.open(0, 1)
    await served.hold(0)
    served.send(step_each({0: 1, 1: 0}, [[2.0], [3.0]]))
    await served.take_all()
    served.serving.cancel()
    await asyncio.wait([served.serving])
    served.executor.gate.set()
    session, _ = await served.sessions.open(Opening(SessionKey("", "s0"), TOKEN, resume=True), MANIFEST, FakeStream())
    assert (session.next_step, session.record().row.tolist()) == (0, [0])
    assert served.sum_of(1) == (0, 0)


@pytest.fixture
async def ahead() -> AsyncIterator[Served]:
    """A stream of sessions whose first step has no answer yet, for they look two steps ahead."""
    served = Served(AHEAD)
    await served.open(0, 1)
    served.send(step_each({0: 0, 1: 0}, [[1.0], [2.0]]))
    assert not (await served.read()).answer.HasField("prediction")
    yield served
    await served.close()


async def hold_the_end(served: Served, *requests: Request) -> None:
    """Let the first tick of the padding wait."""
    served.executor.gate.clear()
    served.executor.entered.clear()
    served.send(*requests)
    await served.take_all()
    assert await asyncio.to_thread(served.executor.entered.wait, 10)


async def test_steps_sent_behind_a_reset_wait_until_it_has_brought_the_last_answers(ahead: Served) -> None:
    await hold_the_end(ahead, reset_handle(0, 1), step_each({0: 1}, [[7.0]]))
    ahead.executor.gate.set()
    reset = (await ahead.read()).reset
    assert (reset.next_step, reset.last.first_step, array(reset.last.prediction.outputs).tolist()) == (1, 0, [[1.0]])
    assert list((await ahead.read()).answer.first_steps) == [1]
    assert ahead.sum_of(0) == (2, 7)


@pytest.mark.parametrize("ending", [reset_handle, close_handle])
async def test_a_session_taken_over_while_its_sequence_ends_stays_as_it_was(ahead: Served, ending: Any) -> None:
    await hold_the_end(ahead, ending(0, 1))
    session, missed = await ahead.sessions.open(Opening(SessionKey("", "s0"), TOKEN, resume=True), AHEAD, FakeStream())
    assert list((await ahead.read()).ended.handles) == [0]
    ahead.executor.gate.set()
    ahead.send(step_each({1: 1}, [[3.0]]))
    assert list((await ahead.read()).answer.handles) == [1]
    assert (missed, session.ledger.pending, session.record().row.tolist()) == ([], 1, [1])


@pytest.mark.parametrize("ending", [reset_handle, close_handle])
async def test_an_end_of_a_sequence_that_fails_is_refused_and_may_be_tried_again(ahead: Served, ending: Any) -> None:
    def fail() -> None:
        raise RuntimeError("secret of the executor")

    ahead.executor.before_return = fail
    ahead.send(ending(0, 1))
    refused = (await ahead.read()).refused
    assert (list(refused.handles), list(refused.next_steps)) == ([0], [1])
    assert "EXECUTION_FAILED" in str(refused.error)
    assert ahead.sum_of(0) == (1, 1)
    ahead.executor.before_return = lambda: None
    ahead.send(ending(0, 1))
    response = await ahead.read()
    last = response.reset.last if response.HasField("reset") else response.closed.closed.last
    assert array(last.prediction.outputs).tolist() == [[1.0]]
