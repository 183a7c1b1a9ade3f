"""Sessions whose streams are cut, cancelled, taken over, parked and failed, each beside what it must come to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.manifest import Manifest
from service.engine.step_engine import StepEngine
from service.errors import ExecutionFailed, ServingError, SessionMoved, StepOutOfOrder
from service.sessions.limits import SessionLimits
from service.sessions.record import HeldAnswer, SessionKey, SessionRecord
from service.sessions.registry import Opening, SessionRegistry
from service.sessions.session import AppliedSteps, Session
from tests.support.fakes import CountingMetrics, FakeStore
from tests.support.faults import Fault, FaultyExecutor, Steps

Array = NDArray[Any]
Call = asyncio.Task[AppliedSteps]
TOKEN = b"0123456789abcdef"
HANGS_S = 20.0  # a thousand times what it takes
LIMITS = SessionLimits(
    max_streams=100,
    max_sessions=100,
    max_sessions_per_tenant=0,
    max_parked_bytes=0,
    max_held_bytes=1_000_000,
    resume_window_s=1_000.0,
    idle_timeout_s=0.0,
    max_age_s=0.0,
)


@dataclass(frozen=True)
class Interruption:
    """Of a message, as soon as so many forwards have begun since it was sent, and so many turns of the loop later."""

    ending: Literal["cancel", "take over", "take over from one that goes on"]
    forwards: int
    turns: int


@dataclass(frozen=True)
class Send:
    """A message of so many new steps, behind some that were applied before."""

    steps: int
    fault: tuple[int, Fault] | None = None  # of the new step of that index, if there are so many
    repeated: int = 0
    last_only: bool = False
    interruption: Interruption | None = None
    pause: int = 0  # turns of the loop before it


@dataclass(frozen=True)
class Reset:
    """Back to the initial state; or the last such message comes again, behind later steps."""

    again: bool = False
    pause: int = 0


@dataclass(frozen=True)
class Move:
    """Another stream takes the session over, or finds it parked, and has missed the last answers."""

    parked: bool
    missed: int = 0
    pause: int = 0


Act = Send | Reset | Move


@dataclass(frozen=True)
class Network:
    """What sessions are stepped with, and what a step must give."""

    manifest: Manifest
    executor: FaultyExecutor
    steps: Steps
    reference: Callable[[Array, Array], tuple[Array, Array]]
    """One step, from a row: -> outputs (outputs,), the row after it (row_size,)."""
    check: Callable[[Array, Array], None]
    """Raises AssertionError if what is found is not near enough to what is wanted."""

    def follow(self, inputs: Array, row: Array) -> tuple[list[Array], Array]:
        """Step after step: all outputs, and the row after the last one."""
        outputs = []
        for x in inputs:
            output, row = self.reference(self.steps.seen(x), row)
            outputs.append(output)
        return outputs, row


class Bench:
    """A registry over one network."""

    def __init__(self, network: Network, engine: StepEngine) -> None:
        self.network = network
        self.metrics = CountingMetrics()
        self.registry = SessionRegistry(
            engine,
            FakeStore(),
            {network.manifest.key: network.manifest},
            LIMITS,
            checkpoint_interval_s=1_000.0,
            checkpoint_steps=0,
            store_timeout_s=100.0,
            metrics=self.metrics,
            clock=lambda: 1_000.0,
        )

    async def play(self, scripts: Sequence[Sequence[Act]], seed: int) -> None:
        """Every script in a session of its own, all at once; then look for what they have left behind."""
        playing = asyncio.create_task(self._play(scripts, seed))
        broken: list[object] = []

        def stop(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            broken.append(context.get("exception") or context["message"])
            playing.cancel()  # or it might wait for ever

        asyncio.get_running_loop().set_exception_handler(stop)
        async with asyncio.timeout(HANGS_S):
            await asyncio.wait([playing])
        assert not broken
        await playing

    async def _play(self, scripts: Sequence[Sequence[Act]], seed: int) -> None:
        clients = [Client(self, str(i), np.random.default_rng((seed, i))) for i in range(len(scripts))]
        await asyncio.gather(*(client.play(script) for client, script in zip(clients, scripts, strict=True)))
        for client in clients:
            client.check()
        counted = sum(int(str(event[2])) for event in self.metrics.events if event[0] == "steps")
        assert counted == sum(client.next_step for client in clients)
        await self._check_nothing_is_queued()

    async def _check_nothing_is_queued(self) -> None:
        """Behind all that was under way, a step of a new session has its tick alone."""
        probe = Client(self, "probe", np.random.default_rng(0))
        await probe.play([Send(1)])
        forwards = len(self.network.executor.batches)
        await probe.send(Send(1))
        assert self.network.executor.batches[forwards:] == [1]


@dataclass(eq=False)
class _Stream:
    """An owner that drops what it has under way when it loses its session, unless it goes on."""

    goes_on: bool = False
    call: Call | None = None

    def lose(self, error: ServingError) -> None:
        if self.call is not None and not self.goes_on:
            self.call.cancel()

    def became_durable(self) -> None: ...


@dataclass(eq=False)
class Client:
    """One session, and what is known of it. The row is what it was, to the bit, when the last message had ended."""

    bench: Bench
    session_id: str
    rng: np.random.Generator
    answers: list[Array | None] = field(default_factory=list)  # to each step; None where it was not asked for
    resets: list[int] = field(default_factory=list)
    dropped: list[Call] = field(default_factory=list)

    session: Session = field(init=False)
    stream: _Stream = field(init=False)
    row: Array = field(init=False)
    records: list[tuple[SessionRecord, Array]] = field(init=False, default_factory=list)

    @property
    def next_step(self) -> int:
        return len(self.answers)

    async def play(self, script: Sequence[Act]) -> None:
        """Do all that; between two acts the session must stay as it is."""
        await self._open(Opening(SessionKey("", self.session_id), TOKEN))
        self.row = np.zeros(self.bench.network.executor.row_size, np.float32)
        for act in script:
            for _ in range(act.pause):
                await asyncio.sleep(0)
            self.check()
            match act:
                case Send():
                    await self.send(act)
                case Reset():
                    self._reset(act)
                case Move():
                    await self._move(act)
            self.check()
        for outcome in await asyncio.gather(*self.dropped, return_exceptions=True):
            assert isinstance(outcome, SessionMoved | asyncio.CancelledError)
        self.check()

    def check(self) -> None:
        """The session is what the steps that were applied have made of it, and so is each checkpoint of it."""
        record = self.session.record()
        assert self.session.next_step == record.next_step == self.next_step
        np.testing.assert_array_equal(record.row, self.row)
        self.records.append((record, self.row))
        for earlier, row in self.records:
            np.testing.assert_array_equal(earlier.row, row)

    async def send(self, message: Send) -> None:
        """And wait until it is answered, cancelled, or another stream has the session."""
        new = self._new_inputs(message)
        repeated = min(message.repeated, self.next_step)
        again = [self.bench.network.steps.faulty("raises", self.rng) for _ in range(repeated)]  # never computed
        first_step, stream, moved = self.next_step - repeated, self.stream, asyncio.Event()
        inputs = np.concatenate([*again, new])
        call = asyncio.create_task(self.session.apply(stream, first_step, inputs, last_only=message.last_only))
        stream.call = call
        if how := message.interruption:
            interrupt = partial(self._interrupt, call, how, moved)
            self.bench.network.executor.after(how.forwards, how.turns, interrupt)
        call.add_done_callback(lambda _: moved.set())
        await moved.wait()
        if self.stream is not stream:
            self.dropped.append(call)
        elif not call.cancelled():
            self._applied(message, new, first_step, call.result())

    def _new_inputs(self, message: Send) -> Array:
        steps = self.bench.network.steps
        inputs = steps.random(message.steps, self.rng)
        if message.fault and message.fault[0] < len(inputs):
            at, fault = message.fault
            inputs[at] = steps.faulty(fault, self.rng)[0]
        return inputs

    def _interrupt(self, call: Call, how: Interruption, moved: asyncio.Event) -> None:
        if call.done():
            return
        if how.ending == "cancel":
            call.cancel()
            return
        self.stream.goes_on = how.ending == "take over from one that goes on"
        self.stream, answered_step = _Stream(), self.next_step
        assert self.session.take(self.stream, answered_step) == []
        moved.set()

    def _applied(self, message: Send, new: Array, first_step: int, applied: AppliedSteps) -> None:
        """Compare an answer with the reference, from the row before the message; its row is the one from now on."""
        network, before = self.bench.network, self.next_step
        good = _good_steps(network.steps, new)
        wanted, wanted_row = network.follow(new[:good], self.row)
        assert applied.next_step == before + good
        assert isinstance(applied.failure, ExecutionFailed) == (good < len(new))
        assert applied.first_step >= first_step
        self.answers += wanted
        if message.last_only:
            self.answers[before:-1] = [None] * (good - 1)
            assert len(applied.outputs) <= 1
        for step, found in enumerate(applied.outputs, applied.first_step):
            self._check_answer(step, found, new=step >= before)
        if good:
            assert len(applied.outputs) >= (1 if message.last_only else good)
            self.row = self.session.record().row.copy()
            network.check(self.row, wanted_row)
            self.bench.registry.changed(self.session, good)

    def _check_answer(self, step: int, found: Array, *, new: bool) -> None:
        wanted = self.answers[step]
        assert wanted is not None
        if new:
            self.bench.network.check(found, wanted)
            self.answers[step] = found.copy()
        else:
            np.testing.assert_array_equal(found, wanted)

    def _reset(self, reset: Reset) -> None:
        earlier = [step for step in self.resets if step < self.next_step]
        if reset.again and earlier:
            with suppress(StepOutOfOrder):  # nobody can still be waiting for the answer to it
                self.session.reset(earlier[-1])
            return
        self.session.reset(self.next_step)
        self.bench.registry.changed(self.session)
        self.row = np.zeros_like(self.row)
        self.resets.append(self.next_step)

    async def _move(self, move: Move) -> None:
        registry = self.bench.registry
        if move.parked:
            registry.leave(self.session, self.stream)
            await registry.checkpoints.write_changed()
        answered_step = max(self.next_step - move.missed, self.session.answered_step)
        key = SessionKey("", self.session_id)
        missed = await self._open(Opening(key, TOKEN, resume=True, answered_step=answered_step))
        assert [held.next_step for held in missed[-1:]] == [self.next_step] * (answered_step < self.next_step)
        for held in missed:
            for step, found in enumerate(held.outputs, held.first_row_step):
                self._check_answer(step, found, new=False)

    async def _open(self, opening: Opening) -> list[HeldAnswer]:
        self.stream = _Stream()
        self.session, missed = await self.bench.registry.open(opening, self.bench.network.manifest, self.stream)
        return missed


def _good_steps(steps: Steps, inputs: Array) -> int:
    """How many can be applied."""
    fails = [steps.fault_of(x) not in (None, "raises beside others") for x in inputs]
    return fails.index(True) if True in fails else len(inputs)
