"""Which cells of whole sequences are computed next. Knows sequences, lanes and fairness; no torch, no clock.

Cellular batching (Gao et al., "Low Latency RNN Inference with Cellular Batching", EuroSys 2018): a batch is no set of
sequences that begin and end together, but all that are at the same cell of a network now. Each joins and leaves alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Model = TypeVar("Model", bound=Hashable)
Member = TypeVar("Member", bound="Sequence")


@dataclass(eq=False, slots=True)
class Sequence:
    """A whole sequence on its way through the stages of a network.

    A stage has one lane, or one for each direction, which do not wait for each other; the next stage needs all of them.
    """

    steps: int
    lanes: tuple[int, ...]  # of each stage
    stage: int = 0
    done: list[int] = field(default_factory=list)  # steps in each lane of the stage
    abandoned: bool = False


class Lane(NamedTuple, Generic[Model]):
    """Of which model, stage and direction."""

    model: Model
    stage: int
    direction: int


class Tick(NamedTuple, Generic[Model, Member]):
    """The next steps of each of these; those that have fewer left end with it."""

    lane: Lane[Model]
    members: list[Member]
    steps: int


class CellScheduler(Generic[Model, Member]):
    """Lanes take turns, and so do the sequences of a lane, whatever is left of them."""

    def __init__(self, max_members: int, max_steps: int) -> None:
        """Of a tick."""
        self._max_members = max_members
        self._max_steps = max_steps
        self._lanes: dict[Lane[Model], deque[Member]] = {}  # only those with sequences, the one whose turn it is first

    def __bool__(self) -> bool:
        """Whether there is a sequence that has not ended."""
        return bool(self._lanes)

    def add(self, model: Model, member: Member) -> None:
        """It enters its first stage."""
        self._enter(model, member)

    def take(self) -> Tick[Model, Member]:
        """Abandoned sequences are left out, so there may be none. Raises StopIteration if there is no lane."""
        lane = next(iter(self._lanes))
        queue, members = self._lanes.pop(lane), list[Member]()
        while queue and len(members) < self._max_members:
            member = queue.popleft()
            if not member.abandoned:
                members.append(member)
        if queue:
            self._lanes[lane] = queue
        longest = max((member.steps - member.done[lane.direction] for member in members), default=0)
        return Tick(lane, members, min(longest, self._max_steps))

    def took(self, tick: Tick[Model, Member]) -> Iterator[Member]:
        """The tick was computed: its sequences go on. Those that have passed a stage, which the next one follows."""
        lane = tick.lane
        for member in tick.members:
            member.done[lane.direction] = min(member.done[lane.direction] + tick.steps, member.steps)
            if member.done[lane.direction] < member.steps:
                self._lanes.setdefault(lane, deque()).append(member)
            elif all(done == member.steps for done in member.done):
                member.stage += 1
                yield member
                if member.stage < len(member.lanes):
                    self._enter(lane.model, member)

    def _enter(self, model: Model, member: Member) -> None:
        directions = member.lanes[member.stage]
        member.done = [0] * directions
        for direction in range(directions):
            self._lanes.setdefault(Lane(model, member.stage, direction), deque()).append(member)
