"""Transcripts: jobs go in, ticks come out. A job is written as its letter, a tick as 'model: jobs'."""

import numpy as np
import pytest

from service.engine.batcher import Batcher, StepJob
from tests.support.fakes import column

ROW = np.zeros(1, np.float32)


class Transcript:
    def __init__(self, max_tick_sessions: int = 8) -> None:
        self.batcher: Batcher[str, StepJob] = Batcher(max_tick_sessions)
        self.jobs: dict[str, StepJob] = {}

    def add(self, model: str, **steps: int) -> None:
        """Jobs by letter, with how many steps each has."""
        for letter, count in steps.items():
            self.jobs[letter] = StepJob(column(*range(count)), ROW)
            self.batcher.add(model, self.jobs[letter])

    def tick(self) -> str:
        """Take and apply one tick; jobs with more steps wait again."""
        model, jobs = self.batcher.take()
        for job in jobs:
            job.apply(ROW, ROW)
            if not job.done:
                self.batcher.add(model, job)
        letters = [next(letter for letter, known in self.jobs.items() if known is job) for job in jobs]
        return f"{model}: {' '.join(letters)}"

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


def test_a_job_knows_its_next_step_its_state_and_its_answers() -> None:
    job = StepJob(column(7, 8), ROW)
    assert job.next_input.tolist() == [7]
    job.apply(np.array([1.0], np.float32), np.array([2.0], np.float32))
    assert (job.next_input.tolist(), job.row.tolist(), job.done) == ([8], [2.0], False)
    job.apply(np.array([3.0], np.float32), np.array([4.0], np.float32))
    assert ([output.tolist() for output in job.outputs], job.row.tolist(), job.done) == ([[1.0], [3.0]], [4.0], True)
