"""Whatever messages of many sessions meet in ticks, each session holds exactly its own steps, in order."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.manifest import ModelKey
from service.engine.executor import Floats
from service.engine.step_engine import StepEngine, Stepped
from service.errors import ServingError
from service.sessions.record import SessionKey, SessionRecord
from service.sessions.session import Session
from service.sessions.together import StepsTogether
from tests.support.fakes import CountingMetrics

MODEL = ModelKey("sums", 1)
RAISES, TURNS_NAN = 1_000_000, 1_000_001
TENANTS = ("a", "b")

values = st.integers(1, 9) | st.sampled_from([RAISES, TURNS_NAN])


@dataclass
class Message:
    """A step of each of some sessions of a tenant, by number; who is taken over meanwhile, and a pause behind."""

    tenant: str
    steps: dict[int, int]
    taken_over: set[int]
    pause: bool


messages = st.builds(
    Message,
    tenant=st.sampled_from(TENANTS),
    steps=st.dictionaries(st.integers(0, 7), values, min_size=1),
    taken_over=st.sets(st.integers(0, 7), max_size=2),
    pause=st.booleans(),
)


class Sums:
    """Two exact sums, of the steps and of the sums before them, so that no two orders of steps end alike."""

    row_size = 2

    def __init__(self) -> None:
        self.largest = 0

    def step(self, inputs: NDArray[np.generic], rows: Floats) -> tuple[Floats, Floats]:
        self.largest = max(self.largest, len(inputs))
        numbers = inputs[:, 0].astype(np.float32)
        if (numbers == RAISES).any():
            raise ValueError("on purpose")
        new_rows = np.column_stack([rows[:, 0] + numbers, rows[:, 0] + rows[:, 1]])
        new_rows[numbers == TURNS_NAN] = np.nan
        return new_rows[:, :1].copy(), new_rows


class Stream:
    """An owner."""

    def lose(self, error: ServingError) -> None:
        """Nothing to end."""

    def became_durable(self) -> None:
        """Nobody to tell."""


@dataclass(eq=False)
class Sent:
    """A session, and what it must have come to: its outputs and its state."""

    session: Session
    outputs: list[float] = field(default_factory=list)
    row: tuple[float, float] = (0.0, 0.0)
    under_way: bool = False

    def apply(self, value: int) -> None:
        self.row = self.row[0] + value, self.row[0] + self.row[1]
        self.outputs.append(self.row[0])


class Bench:
    """Sessions of one engine, and messages for them."""

    def __init__(self, max_tick_sessions: int, max_loop_tick_s: float) -> None:
        self.executor, metrics = Sums(), CountingMetrics()
        self.engine = StepEngine(
            {MODEL: self.executor},
            max_tick_sessions=max_tick_sessions,
            metrics=metrics,
            max_loop_tick_s=max_loop_tick_s,
        )
        self.sent: dict[tuple[str, int], Sent] = {}
        self.under_way: set[asyncio.Future[None]] = set()
        for tenant in TENANTS:
            for number in range(8):
                record = SessionRecord(
                    SessionKey(tenant, str(number)), MODEL, "", b"", 0, 0, self.engine.initial_row(MODEL)
                )
                session = Session(record, self.engine, metrics, max_held_bytes=2**20, clock=time.time)
                session.take(Stream(), 0)
                self.sent[tenant, number] = Sent(session)

    def send(self, message: Message) -> None:
        """Of the sessions that have no step under way."""
        free = {n: value for n, value in message.steps.items() if not self.sent[message.tenant, n].under_way}
        if not free:
            return
        sent, steps = [self.sent[message.tenant, number] for number in free], list(free.values())
        owners = [one.session.owner or Stream() for one in sent]
        ended = asyncio.get_running_loop().create_future()
        self.under_way.add(ended)

        def applied(first: int, stepped: Stepped, which: Sequence[int], silent: Sequence[int]) -> None:
            assert not silent
            for i in range(len(stepped.outputs)):
                one, value = sent[first + i], steps[first + i]
                one.under_way = False
                may = one.session.owner is owners[first + i] and value not in (RAISES, TURNS_NAN)
                assert may == (i in which)
                if may:
                    one.apply(value)
            if not job.left:
                ended.set_result(None)

        def dropped() -> None:
            ended.cancel()

        for one in sent:
            one.under_way = True
        inputs = np.array(steps, np.float32)[:, np.newaxis]
        job = StepsTogether(inputs, [one.session for one in sent], owners, applied, dropped, time.time)
        self.engine.submit(MODEL, job)
        for number in message.taken_over:
            self.sent[message.tenant, number].session.take(Stream(), 0)

    async def play(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.send(message)
            if message.pause:
                await asyncio.sleep(0)
        await asyncio.gather(*self.under_way)
        self.engine.close()
        for one in self.sent.values():
            assert one.session.state.row.tolist() == list(one.row)
            assert one.session.next_step == len(one.outputs)
            held = [float(output) for answer in one.session.ledger.held for output in answer.outputs[:, 0]]
            assert held == one.outputs


@settings(deadline=None, max_examples=200)
@given(st.lists(messages, max_size=12), st.integers(1, 10), st.sampled_from([0.0, math.inf]))
def test_every_session_has_exactly_the_steps_that_its_owner_sent_and_that_did_not_fail(
    messages: list[Message], max_tick_sessions: int, max_loop_tick_s: float
) -> None:
    async def play() -> int:
        bench = Bench(max_tick_sessions, max_loop_tick_s)
        async with asyncio.timeout(60):
            await bench.play(messages)
        return bench.executor.largest

    assert asyncio.run(play()) <= max_tick_sessions
