"""What is done to a stream, drawn from a seed."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

Point = Literal["before_send", "after_send", "after_apply", "after_checkpoint", "before_answer"]
Fault = Literal[
    "kill",
    "stop",
    "cut",
    "half_close",
    "black_hole",
    "full_disk",
    "locked_database",
    "client_dies",
    "both_die",
    "taken_over",
]
Target = Literal["steps", "reset", "close"]
Clients = Literal["both", "streams", "multiplexed"]
"""What plans may have; which one of both, the seed says."""
POINTS: tuple[Point, ...] = get_args(Point)
FAULTS: tuple[Fault, ...] = get_args(Fault)
OF_PROCESSES: tuple[Fault, ...] = ("client_dies", "both_die", "taken_over")
PAIRS = tuple(
    (FAULTS[n % len(FAULTS)], POINTS[(n % len(FAULTS) + n // len(FAULTS)) % len(POINTS)])
    for n in range(len(FAULTS) * len(POINTS))
)
"""Each fault at each point; as many in a row as there are faults have each of them."""

STEPS = 40  # besides the last one, which proves the state
MULTIPLEXED = (2, 3, 5)  # sessions on one call


@dataclass(frozen=True)
class Script:
    """What a client sends: whole numbers in messages of several, and resets before some of them."""

    values: tuple[float, ...]
    message_ends: tuple[int, ...]
    resets: tuple[int, ...]
    ahead: int
    pause_s: float
    sends_again_twice: bool

    def expected(self) -> list[tuple[float, float]]:
        """The right answer to each step."""
        from tests.support.bundles import accumulated  # needs torch, which a client process does without

        edges = [0, *self.resets, len(self.values)]
        return [row for start, end in itertools.pairwise(edges) for row in accumulated(self.values[start:end])]

    def of_neighbour(self, number: int) -> Script:
        """The same with other values, for another session of the same call; that of number 0 is this one."""
        return replace(self, values=self.values[number:] + self.values[:number])

    def messages(self, first: int, end: int) -> list[tuple[int, int]]:
        """From and up to which step each message goes, between these steps."""
        edges = [first, *(edge for edge in self.message_ends if first < edge < end), end]
        return list(itertools.pairwise(edges)) if first < end else []


@dataclass(frozen=True)
class Plan:
    """One fault at one point, when the stream has come to this step, or to the reset before it, or to its end."""

    seed: int
    attempt: int
    point: Point
    fault: Fault
    target: Target
    step: int
    script: Script
    choice: float
    """0 to 1, for what differs between two faults of one kind."""
    multiplexed: int
    """How many sessions the client has on one multiplexed call; 0 = it has a stream."""

    @property
    def is_multiplexed(self) -> bool:
        return self.multiplexed > 0

    @property
    def first_of_message(self) -> int:
        """How many steps are answered when all before the message are."""
        if self.target != "steps":
            return min(self.step, STEPS + 1)
        if self.is_multiplexed:
            return self.step
        return max(edge for edge in (0, *self.script.message_ends) if edge <= self.step)

    @property
    def session(self) -> str:
        """That at which the plan strikes."""
        return f"chaos-{self.seed}-{self.attempt}"

    @property
    def scripts(self) -> dict[str, Script]:
        """Of all sessions of the client, by name; the struck one is the first."""
        neighbours = {f"{self.session}-{n}": self.script.of_neighbour(n) for n in range(1, self.multiplexed)}
        return {self.session: self.script, **neighbours}


def make_plan(seed: int, attempt: int = 0, clients: Clients = "both") -> Plan:
    """Seeds in a row go round all pairs of fault and point. Another attempt differs in where it strikes alone."""
    drawn = random.Random(seed)
    fault, point = PAIRS[seed % len(PAIRS)]
    sizes = itertools.accumulate(drawn.choice((1, 1, 2, 3, 5)) for _ in range(STEPS))
    ends = tuple(end for end in sizes if end < STEPS)
    script = Script(
        values=tuple(float(drawn.randint(1, 9)) for _ in range(STEPS + 1)),
        message_ends=ends,
        resets=tuple(sorted(drawn.sample(ends, drawn.choice((1, 2) if fault == "both_die" else (0, 0, 1, 2))))),
        ahead=drawn.choice((2, 4, 16)),
        pause_s=drawn.choice((0.0, 0.005, 0.02)),
        sends_again_twice=drawn.random() < 0.5,
    )
    choice = drawn.random()
    target, step = _place(script, fault, point, random.Random(f"{seed}/{attempt}"))
    sessions, is_multiplexed = drawn.choice(MULTIPLEXED), is_one_multiplexed(clients, drawn)
    return Plan(seed, attempt, point, fault, target, step, script, choice, sessions if is_multiplexed else 0)


def is_one_multiplexed(clients: Clients, drawn: random.Random) -> bool:
    """Whether the next client is; of both kinds every other one, by chance."""
    chance = drawn.random()
    return clients == "multiplexed" or (clients == "both" and chance < 0.5)


def _place(script: Script, fault: Fault, point: Point, drawn: random.Random) -> tuple[Target, int]:
    """Every third plan strikes at a reset or at the end, where there is such a message and such a point.

    Where both sides die it is right behind a reset, for only then could that be forgotten.
    """
    if fault == "both_die":
        return "steps", drawn.choice(script.resets)
    kinds: list[Target] = ["steps"] * 4
    if point != "after_checkpoint":  # which is of steps
        kinds += ["reset"] if script.resets else []
        kinds += ["close"]
    target = drawn.choice(kinds)
    places = {"steps": range(STEPS), "reset": script.resets, "close": [STEPS + 1]}[target]
    return target, drawn.choice(list(places))
