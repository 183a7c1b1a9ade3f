"""Whole sequences in cellular batches: each joins and leaves at a tick, and none waits for another to end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from models.beam import Decoding, Hypothesis
from models.seq2seq import Writing, begin_writing, write_on
from service.engine.cell_scheduler import CellScheduler, Sequence, Tick
from service.engine.sequence_network import Floats, SequenceNetwork

Room: TypeAlias = Callable[[], Floats]
"""Where the outputs of the next stage go: (steps, hidden * directions)."""

NOTHING = np.empty((0, 0), np.float32)

TICK_LABELS, TICK_ATTENDED_STEPS = 8, 2**18
"""That a decoder writes in a tick: a label costs as much as many steps, and most outputs are short.

Fewer, where all paths together attend to more steps than so many.
"""

MAX_UNUSED_STEPS = 8
"""Behind the end of a sequence: a kernel's call costs as much as a few steps."""


@dataclass(eq=False, slots=True)
class _Running(Sequence):
    """inputs (steps, width) and outputs (steps, hidden * directions) of the stage, rows: the state of each lane."""

    number: int = field(kw_only=True)
    network: SequenceNetwork = field(kw_only=True)
    inputs: Floats = field(kw_only=True)
    room: Room | None = field(kw_only=True)  # for its outputs; None = memory
    decoding: Decoding | None = field(kw_only=True)  # of an encoder-decoder
    writing: Writing | None = field(init=False, default=None)  # in the stage of the decoder
    outputs: Floats = field(init=False)
    in_order: list[tuple[Floats, Floats]] = field(init=False)  # of each direction: the two as it sees them
    rows: list[Floats] = field(init=False)

    def __post_init__(self) -> None:
        self.begin_stage()

    def begin_stage(self) -> None:
        if self.network.decoder and self.decoding and self.stage == len(self.network.stages):
            self.writing = begin_writing(self.network.decoder, torch.from_numpy(self.inputs), self.decoding)
            self.steps = sys.maxsize  # nobody knows yet
            return
        kernels, hidden = self.network.stages[self.stage], self.network.hidden_size
        self.outputs = self.room() if self.room else np.empty((self.steps, hidden * len(kernels)), np.float32)
        parts = [self.outputs[:, i * hidden : (i + 1) * hidden] for i in range(len(kernels))]
        orders = [slice(None), slice(None, None, -1)]
        self.in_order = [(self.inputs[order], part[order]) for order, part in zip(orders, parts, strict=False)]
        self.rows = [np.zeros(kernel.row_size, np.float32) for kernel in kernels]


Answer: TypeAlias = Floats | list[Hypothesis]
"""Outputs (steps, outputs), or (1, outputs) about the whole; of an encoder-decoder the hypotheses, the best first."""


class Ended(NamedTuple):
    """What became of a sequence: its answer, or why it failed.

    Of one that was added with its room, what the last stage gave about each step: (steps, hidden * directions).
    """

    number: int
    outcome: Answer | str


class TickDone(NamedTuple):
    """So many sequences of a network shared a tick, and these ended with it.

    `steps` are what was computed of them, and `padding` those of them that are behind an end.
    """

    network: SequenceNetwork
    sequences: int
    duration_s: float
    ended: list[Ended]
    steps: int
    padding: int


class SequenceEngine:
    """Runs a tick when it is told to; no queue, no thread."""

    def __init__(self, max_tick_sequences: int, max_tick_steps: int) -> None:
        self._running: dict[int, _Running] = {}
        self._computed = self._padding = 0  # steps of this tick
        self._scheduler: CellScheduler[SequenceNetwork, _Running] = CellScheduler(max_tick_sequences, max_tick_steps)

    def __bool__(self) -> bool:
        """Whether there is work."""
        return bool(self._scheduler)

    def add(
        self,
        number: int,
        network: SequenceNetwork,
        sequence: NDArray[np.generic],
        decoding: Decoding | None = None,
    ) -> None:
        """Begin one: (steps, features) or (steps,). Raises whatever the network does that cannot read it."""
        self.add_read(number, network, network.read(sequence), decoding=decoding)

    def add_read(
        self,
        number: int,
        network: SequenceNetwork,
        inputs: Floats,
        room: Room | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        """Begin one that the network has read: (steps, width). Raises ValueError."""
        if (network.decoder is None) != (decoding is None):
            raise ValueError("an encoder-decoder needs to know how to decode, and nothing else does")
        running = _Running(
            len(inputs), network.lanes, number=number, network=network, inputs=inputs, room=room, decoding=decoding
        )
        self._running[number] = running
        self._scheduler.add(network, running)

    def progress(self, number: int) -> tuple[int, int]:
        """Of all steps in the lanes of its stages, those that are computed, and how many these are."""
        running = self._running[number]
        done = running.steps * sum(running.lanes[: running.stage]) + sum(running.done)
        return done, running.steps * sum(running.lanes)

    def abandon(self, number: int) -> None:
        """Nobody wants it any more; one that has ended is none."""
        if running := self._running.pop(number, None):
            running.abandoned = True
            running.inputs = running.outputs = NOTHING  # its lane still has it, but what it holds is free now
            running.in_order, running.room, running.writing = [], None, None

    def tick(self) -> TickDone:
        """The next one. Raises StopIteration if there is no work."""
        start_s = time.perf_counter()
        self._computed = self._padding = 0
        tick, ended = self._scheduler.take(), list[Ended]()
        if tick.members:
            ended = [*self._compute(tick), *self._go_on(tick)]
        duration_s = time.perf_counter() - start_s
        return TickDone(tick.lane.model, len(tick.members), duration_s, ended, self._computed, self._padding)

    def _compute(self, tick: Tick[SequenceNetwork, _Running]) -> list[Ended]:
        """Those that fail, one by one if need be, so that only the guilty do."""
        try:
            if tick.lane.stage == len(tick.lane.model.stages):
                _write(tick)
            else:
                computed, used = _step(tick)
                self._computed += computed
                self._padding += computed - used
        except Exception as error:
            if len(tick.members) == 1:
                return [self._fail(tick.members[0], repr(error))]
            return [end for member in tick.members for end in self._compute(tick._replace(members=[member]))]
        return []

    def _fail(self, member: _Running, why: str) -> Ended:
        self.abandon(member.number)
        return Ended(member.number, why)

    def _go_on(self, tick: Tick[SequenceNetwork, _Running]) -> list[Ended]:
        ended = []
        going = tick._replace(members=[member for member in tick.members if not member.abandoned])
        for member in self._scheduler.took(going):
            try:
                if member.stage < len(member.lanes):
                    member.inputs = member.outputs
                    member.begin_stage()
                else:
                    ended.append(Ended(member.number, _answer(member)))
                    del self._running[member.number]
            except Exception as error:  # no memory, say
                ended.append(self._fail(member, repr(error)))
        return ended


def _answer(member: _Running) -> Answer:
    if member.writing:
        return member.writing.beam.hypotheses()
    hidden = member.network.about_steps(member.outputs)
    return hidden if member.room else member.network.answer(hidden)


def _write(tick: Tick[SequenceNetwork, _Running]) -> None:
    """Some labels more of each output; one that is over has no steps left."""
    writings = [(member, member.writing) for member in tick.members if member.writing]
    if tick.lane.model.decoder:
        attended = sum(len(writing.memory) * writing.beam.decoding.beam_width for _, writing in writings)
        labels = max(1, min(TICK_LABELS, TICK_ATTENDED_STEPS // max(1, attended)))
        write_on(tick.lane.model.decoder, [writing for _, writing in writings], labels)
    for member, writing in writings:
        if writing.beam.is_over:
            member.steps = 0


@torch.inference_mode()
def _step(tick: Tick[SequenceNetwork, _Running]) -> tuple[int, int]:
    """The next steps of each, from its inputs and state to its outputs and state.

    How many were computed, and how many of these anybody needs.
    """
    (network, stage, direction), members, steps = tick
    kernel = network.stages[stage][direction]
    members = sorted(members, key=lambda member: member.done[direction] - member.steps)
    left = [member.steps - member.done[direction] for member in members]
    rows = torch.from_numpy(np.stack([member.rows[direction] for member in members]))
    inputs = np.empty((steps, len(members), members[0].inputs.shape[1]), np.float32)
    outputs = np.empty((steps, len(members), network.hidden_size), np.float32)
    for i, member in enumerate(members):
        inputs[: left[i], i] = member.in_order[direction][0][member.done[direction] :][:steps]
        if left[i] < steps:
            inputs[left[i] :, i] = 0
    runs = list(_runs(left, steps))
    for first, end, going in runs:
        computed, rows = kernel.run(torch.from_numpy(inputs[first:end, :going]).contiguous(), rows[:going])
        outputs[first:end, :going] = computed.numpy()
    for i, member in enumerate(members):
        member.in_order[direction][1][member.done[direction] :][:steps] = outputs[: left[i], i]
    for member, row in zip(members, rows.numpy(), strict=False):  # those that have ended need none
        member.rows[direction] = row
    return sum((end - first) * going for first, end, going in runs), sum(min(own, steps) for own in left)


def _runs(left: list[int], steps: int) -> Iterator[tuple[int, int, int]]:
    """First step, end, and how many sequences go on so far: those that end leave after some steps without use.

    `left` says how many steps each has, the most first.
    """
    first = 0
    while first < steps:
        going = sum(own > first for own in left)
        end = min(-(-left[going - 1] // MAX_UNUSED_STEPS) * MAX_UNUSED_STEPS, steps)
        yield first, end, going
        first = end
