"""Transcripts: sequences go in, ticks come out. A tick is written as 'lane: sequences × steps'."""

from dataclasses import dataclass, field

import pytest

from service.engine.cell_scheduler import CellScheduler, Sequence


@dataclass(eq=False, slots=True)
class Named(Sequence):
    name: str = field(kw_only=True)


FORWARD, BIDIRECTIONAL = (1,), (2, 2)


class Transcript:
    def __init__(self, max_members: int = 8, max_steps: int = 100) -> None:
        self.scheduler: CellScheduler[str, Named] = CellScheduler(max_members, max_steps)
        self.members: dict[str, Named] = {}
        self.ended: list[str] = []

    def add(self, model: str = "m", lanes: tuple[int, ...] = FORWARD, **steps: int) -> None:
        """Sequences by name, with how many steps each has."""
        for name, count in steps.items():
            self.members[name] = Named(count, lanes, name=name)
            self.scheduler.add(model, self.members[name])

    def tick(self) -> str:
        tick = self.scheduler.take()
        self.ended += [member.name for member in self.scheduler.took(tick) if member.stage == len(member.lanes)]
        model, stage, direction = tick.lane
        names = " ".join(member.name for member in tick.members)
        return f"{model}{stage}{'>' if direction == 0 else '<'}: {names} × {tick.steps}"

    def ticks(self) -> list[str]:
        ticks = []
        while self.scheduler:
            ticks.append(self.tick())
        return ticks


def test_sequences_that_are_there_share_a_tick_to_the_end_of_the_longest() -> None:
    t = Transcript()
    t.add(a=3, b=5)
    assert t.ticks() == ["m0>: a b × 5"]
    assert t.ended == ["a", "b"]


def test_a_sequence_joins_at_the_next_tick_and_leaves_before_the_others() -> None:
    t = Transcript(max_steps=4)
    t.add(long=10)
    assert t.tick() == "m0>: long × 4"
    t.add(short=3)
    assert t.ticks() == ["m0>: long short × 4", "m0>: long × 2"]
    assert t.ended == ["short", "long"]


def test_a_layer_of_two_directions_has_two_lanes_and_the_next_layer_needs_both_ends() -> None:
    t = Transcript(max_steps=2)
    t.add(lanes=BIDIRECTIONAL, a=3)
    assert t.ticks() == [f"m{lane}: a × {steps}" for lane, steps in zip(
        ("0>", "0<", "0>", "0<", "1>", "1<", "1>", "1<"), (2, 2, 1, 1, 2, 2, 1, 1), strict=True
    )]  # fmt: skip
    assert t.ended == ["a"]


def test_sequences_in_different_layers_do_not_wait_for_each_other() -> None:
    t = Transcript(max_steps=2)
    t.add(lanes=BIDIRECTIONAL, a=2)
    assert [t.tick(), t.tick()] == ["m0>: a × 2", "m0<: a × 2"]
    t.add(lanes=BIDIRECTIONAL, b=2)
    assert t.ticks() == ["m1>: a × 2", "m1<: a × 2", "m0>: b × 2", "m0<: b × 2", "m1>: b × 2", "m1<: b × 2"]


def test_a_stage_of_unknown_length_is_shared_and_ends_for_each_when_it_has_no_steps_left() -> None:
    t = Transcript(max_steps=4)
    t.add(lanes=(1, 1), a=3, b=4)
    assert t.tick() == "m0>: a b × 4"
    for member in t.members.values():
        member.steps = 1_000
    assert t.tick() == "m1>: a b × 4"
    t.members["a"].steps = 0
    assert [t.tick(), t.tick()] == ["m1>: a b × 4", "m1>: b × 4"]
    assert t.ended == ["a"]


def test_of_more_sequences_than_a_tick_takes_each_has_its_turn_before_one_has_a_second() -> None:
    t = Transcript(max_members=2, max_steps=1)
    t.add(a=2, b=2, c=2)
    assert t.ticks() == ["m0>: a b × 1", "m0>: c a × 1", "m0>: b c × 1"]


def test_a_short_sequence_behind_many_long_ones_gets_its_turn_and_they_go_on() -> None:
    t = Transcript(max_members=2, max_steps=1)
    t.add(a=100, b=100, c=100)
    t.tick()
    t.add(short=1)
    assert [t.tick(), t.tick()] == ["m0>: c a × 1", "m0>: b short × 1"]
    assert t.ended == ["short"]


def test_models_take_turns() -> None:
    t = Transcript(max_steps=1)
    t.add("m", a=2)
    t.add("n", b=2)
    assert t.ticks() == ["m0>: a × 1", "n0>: b × 1", "m0>: a × 1", "n0>: b × 1"]


def test_a_model_with_more_sequences_than_a_tick_takes_has_no_second_turn_before_the_others() -> None:
    t = Transcript(max_members=1, max_steps=1)
    t.add("m", a=1, b=1, c=1)
    t.add("n", d=2)
    assert t.ticks() == ["m0>: a × 1", "n0>: d × 1", "m0>: b × 1", "n0>: d × 1", "m0>: c × 1"]


def test_an_abandoned_sequence_is_left_out_in_every_lane_and_its_neighbours_stay() -> None:
    t = Transcript(max_steps=2)
    t.add(lanes=BIDIRECTIONAL, a=4, b=2)
    t.tick()
    t.members["a"].abandoned = True
    assert t.ticks() == ["m0<: b × 2", "m0>:  × 0", "m1>: b × 2", "m1<: b × 2"]
    assert t.ended == ["b"]


def test_nothing_is_there_at_first_and_nothing_after_the_last() -> None:
    t = Transcript()
    assert not t.scheduler
    t.add(a=1)
    assert t.scheduler
    t.tick()
    assert not t.scheduler
    with pytest.raises(StopIteration):
        t.scheduler.take()
