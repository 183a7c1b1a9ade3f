"""Transcripts: jobs go in, ticks come out. A tick is written as 'model: jobs', each with its steps if they are many."""

import pytest

from service.engine.batcher import Batcher, StepJob
from tests.support.fakes import column


class Transcript:
    def __init__(self, max_tick_sessions: int = 8) -> None:
        self.batcher: Batcher[str, StepJob] = Batcher(max_tick_sessions)
        self.jobs: dict[str, StepJob] = {}

    def add(self, model: str, tenant: str = "", **steps: int) -> None:
        """Jobs of one session each, by name, with how many steps each has."""
        self._add(model, tenant, in_turn=True, **steps)

    def add_together(self, model: str, tenant: str = "", **steps: int) -> None:
        """The same of as many sessions as there are steps."""
        self._add(model, tenant, in_turn=False, **steps)

    def _add(self, model: str, tenant: str, *, in_turn: bool, **steps: int) -> None:
        for name, count in steps.items():
            self.jobs[name] = StepJob(column(*range(count)), in_turn, tenant)
            self.batcher.add(model, self.jobs[name])

    def tick(self) -> str:
        """Take one tick; jobs with more steps wait again."""
        model, shares = self.batcher.take()
        for job, _ in shares:
            if job.left:
                self.batcher.add(model, job)
        names = {id(job): name for name, job in self.jobs.items()}
        return f"{model}: {' '.join(names[id(job)] + (f'*{steps}' if steps > 1 else '') for job, steps in shares)}"

    def ticks(self) -> list[str]:
        ticks = []
        while self.batcher:
            ticks.append(self.tick())
        return ticks


def test_jobs_that_wait_together_share_a_tick() -> None:
    t = Transcript()
    t.add("m", a=1, b=1, c=1)
    assert t.ticks() == ["m: a b c"]


def test_a_job_of_several_steps_takes_one_tick_for_each() -> None:
    t = Transcript()
    t.add("m", a=3, b=1, c=2)
    assert t.ticks() == ["m: a b c", "m: a c", "m: a"]


def test_a_tick_takes_those_that_waited_longest_up_to_its_limit() -> None:
    t = Transcript(max_tick_sessions=2)
    t.add("m", a=1, b=1, c=1)
    assert t.ticks() == ["m: a b", "m: c"]


def test_a_long_job_delays_a_short_one_by_at_most_one_tick() -> None:
    t = Transcript(max_tick_sessions=1)
    t.add("m", long=100)
    assert t.tick() == "m: long"
    t.add("m", short=1)
    assert [t.tick(), t.tick()] == ["m: long", "m: short"]


def test_every_waiting_job_gets_its_turn_before_one_gets_a_second() -> None:
    t = Transcript(max_tick_sessions=2)
    t.add("m", a=2, b=2, c=2)
    assert t.ticks() == ["m: a b", "m: c a", "m: b c"]


def test_models_take_turns() -> None:
    t = Transcript(max_tick_sessions=1)
    t.add("m", a=2, b=1)
    t.add("n", c=2)
    assert t.ticks() == ["m: a", "n: c", "m: b", "n: c", "m: a"]


def test_a_tenant_of_many_sessions_delays_one_of_few_by_at_most_one_tick() -> None:
    t = Transcript(max_tick_sessions=2)
    t.add("m", tenant="many", a=2, b=2, c=2, d=2)
    assert t.tick() == "m: a b"
    t.add("m", tenant="few", x=2)
    assert t.ticks() == ["m: x c", "m: x d", "m: a b", "m: c d"]


def test_what_a_tenant_leaves_of_its_share_goes_to_the_others() -> None:
    t = Transcript(max_tick_sessions=6)
    t.add_together("m", tenant="large", l=10)
    t.add_together("m", tenant="middle", m=10)
    t.add("m", tenant="small", s=1)
    assert t.ticks() == ["m: s l*2 m*3", "m: l*3 m*3", "m: m*3 l*3", "m: m l*2"]


def test_more_tenants_than_a_tick_takes_take_turns() -> None:
    t = Transcript(max_tick_sessions=2)
    for tenant in "abc":
        t.add("m", tenant=tenant, **{tenant: 2})
    assert t.ticks() == ["m: a b", "m: c a", "m: b c"]


def test_a_tenant_of_abandoned_jobs_takes_no_place_from_the_others() -> None:
    t = Transcript(max_tick_sessions=2)
    for tenant in "abc":
        t.add("m", tenant=tenant, **{tenant: 1})
    t.jobs["a"].abandoned = True
    assert t.ticks() == ["m: b c"]


def test_tenants_of_abandoned_jobs_alone_leave_nothing_behind() -> None:
    t = Transcript()
    t.add("m", tenant="a", a=1)
    t.add("m", tenant="b", b=1)
    t.jobs["a"].abandoned = t.jobs["b"].abandoned = True
    assert t.ticks() == ["m: "]


def test_an_abandoned_job_is_left_out_and_its_neighbours_stay() -> None:
    t = Transcript()
    t.add("m", a=1, b=1, c=1)
    t.jobs["b"].abandoned = True
    assert t.ticks() == ["m: a c"]


def test_a_tick_of_abandoned_jobs_is_empty() -> None:
    t = Transcript()
    t.add("m", a=1)
    t.jobs["a"].abandoned = True
    assert t.ticks() == ["m: "]


def test_nothing_waits_at_first_and_nothing_after_the_last() -> None:
    t = Transcript()
    assert not t.batcher
    t.add("m", a=1)
    assert t.batcher
    t.tick()
    assert not t.batcher
    with pytest.raises(StopIteration):
        t.batcher.take()


def test_steps_of_many_sessions_share_a_tick_up_to_its_limit() -> None:
    t = Transcript(max_tick_sessions=4)
    t.add_together("m", all=6)
    assert t.ticks() == ["m: all*4", "m: all*2"]


def test_steps_of_many_sessions_share_a_tick_with_those_of_others() -> None:
    t = Transcript(max_tick_sessions=4)
    t.add("m", a=2)
    t.add_together("m", all=2)
    t.add("m", b=1)
    assert t.ticks() == ["m: a all*2 b", "m: a"]


def test_a_job_of_many_sessions_delays_a_short_one_by_at_most_one_tick() -> None:
    t = Transcript(max_tick_sessions=2)
    t.add_together("m", all=100)
    assert t.tick() == "m: all*2"
    t.add("m", short=1)
    assert [t.tick(), t.tick()] == ["m: all*2", "m: short all"]


def test_a_job_abandoned_between_two_ticks_has_no_other() -> None:
    t = Transcript(max_tick_sessions=2)
    t.add_together("m", all=4)
    t.tick()
    t.jobs["all"].abandoned = True
    assert t.ticks() == ["m: "]


def test_a_job_knows_what_is_left_of_it_and_what_one_tick_may_take() -> None:
    chunk, batch = StepJob(column(7, 8), in_turn=True), StepJob(column(7, 8), in_turn=False)
    assert [(job.left, job.ready) for job in (chunk, batch)] == [(2, 1), (2, 2)]
    chunk.taken = batch.taken = 1
    assert [(job.left, job.ready) for job in (chunk, batch)] == [(1, 1), (1, 1)]
    chunk.taken = batch.taken = 2
    assert [(job.left, job.ready) for job in (chunk, batch)] == [(0, 0), (0, 0)]


def alone(t: Transcript, model: str, tenant: str = "", **steps: int) -> None:
    for name, count in steps.items():
        t.jobs[name] = StepJob(column(*range(count)), True, tenant, alone=True)
        t.batcher.add(model, t.jobs[name])


def test_a_job_that_goes_alone_shares_no_tick_and_holds_up_the_others_for_one_at_a_time() -> None:
    t = Transcript()
    alone(t, "m", x=2, y=2)
    t.add("m", a=3, b=3)
    assert t.ticks() == ["m: x", "m: a b", "m: y", "m: a b", "m: x", "m: a b", "m: y"]


def test_jobs_that_go_alone_take_turns_by_tenant() -> None:
    t = Transcript()
    alone(t, "m", "many", x=1, y=1, z=1)
    alone(t, "m", "one", a=1)
    assert t.ticks() == ["m: x", "m: a", "m: y", "m: z"]


def test_an_abandoned_job_that_goes_alone_has_no_tick() -> None:
    t = Transcript()
    alone(t, "m", x=1, y=1)
    t.jobs["x"].abandoned = True
    assert t.ticks() == ["m: y"]
