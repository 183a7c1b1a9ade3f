"""The exactly-once rules, without network, torch or clock."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from service.errors import ResumePointLost, StepOutOfOrder
from service.sessions.ledger import ANSWER_OVERHEAD_BYTES, Ledger, joined
from service.sessions.record import HeldAnswer
from tests.support.fakes import column


def ledger(max_held_bytes: int = 10_000) -> Ledger:
    return Ledger(max_held_bytes=max_held_bytes)


def rows(answers: list[HeldAnswer]) -> list[tuple[int, list[float]]]:
    return [(answer.first_row_step, answer.outputs[:, 0].tolist()) for answer in answers]


def test_answers_are_held_until_they_are_acknowledged() -> None:
    book = ledger()
    book.applied(column(10, 11))
    book.applied(column(12))
    assert rows(book.resume(0)) == [(0, [10, 11]), (2, [12])]
    assert rows(book.resume(1)) == [(1, [11]), (2, [12])]
    book.acknowledge(2)
    assert rows(book.resume(2)) == [(2, [12])]


def test_what_was_acknowledged_cannot_be_asked_for_again() -> None:
    book = ledger()
    book.applied(column(10, 11))
    book.acknowledge(2)
    with pytest.raises(ResumePointLost) as refusal:
        book.resume(1)
    assert refusal.value.metadata == {"expected_step": "2"}


def test_an_acknowledgement_is_never_taken_back() -> None:
    book = ledger()
    book.applied(column(10, 11))
    book.acknowledge(2)
    book.acknowledge(0)
    assert book.answered_step == 2


def test_past_the_limit_the_oldest_answers_are_dropped_and_resuming_before_them_is_refused() -> None:
    book = ledger(max_held_bytes=2 * (ANSWER_OVERHEAD_BYTES + 4))
    for step in range(3):
        book.applied(column(step))
    with pytest.raises(ResumePointLost):
        book.resume(0)
    assert rows(book.resume(1)) == [(1, [1]), (2, [2])]


def test_a_gap_is_refused_with_the_expected_index() -> None:
    book = ledger()
    book.applied(column(10, 11))
    with pytest.raises(StepOutOfOrder) as refusal:
        book.new_steps(3, 1)
    assert refusal.value.metadata == {"expected_step": "2"}


@pytest.mark.parametrize(("first_step", "steps", "new"), [(0, 1, 0), (0, 2, 0), (1, 2, 1), (2, 3, 3), (0, 5, 3)])
def test_only_steps_that_were_not_applied_before_are_new(first_step: int, steps: int, new: int) -> None:
    book = ledger()
    book.applied(column(10, 11))
    assert book.new_steps(first_step, steps) == new


def test_rows_about_known_steps_are_those_that_were_given_before() -> None:
    book = ledger()
    book.applied(column(10, 11))
    book.applied(column(12, 13, 14))
    assert joined(book.answer_again(1, 4)[1])[:, 0].tolist() == [11, 12, 13]
    book.acknowledge(2)
    assert joined(book.answer_again(0, 4)[1])[:, 0].tolist() == [12, 13]
    assert book.answer_again(0, 2) == (2, [])


def test_of_a_message_answered_about_its_last_step_only_that_row_is_held() -> None:
    book = ledger()
    assert book.applied(column(10, 11, 12), last_only=True).tolist() == [[12]]
    assert rows(book.resume(0)) == rows(book.resume(2)) == [(2, [12])]
    assert joined(book.answer_again(0, 3)[1])[:, 0].tolist() == [12]


def test_a_reset_that_is_sent_again_is_known_even_behind_later_steps() -> None:
    book = ledger()
    book.applied(column(10))
    assert book.reset(1)
    assert book.reset(1), "a second reset in the same place changes nothing, so it may be done again"
    book.applied(column(11))
    assert not book.reset(1)
    with pytest.raises(StepOutOfOrder):
        book.reset(0)
    book.acknowledge(2)
    with pytest.raises(StepOutOfOrder):
        book.reset(1)


def test_a_client_that_is_ahead_after_a_crash_may_begin_again_where_the_session_stands() -> None:
    book = Ledger(next_step=2, max_held_bytes=10_000)
    assert book.resume(5) == []
    assert book.resume(2) == []
    book.applied(column(12))
    assert rows(book.resume(2)) == [(2, [12])]


def test_a_client_that_is_ahead_after_a_crash_is_not_owed_what_it_has() -> None:
    book = Ledger(next_step=2, answered_step=0, held=[HeldAnswer(0, 2, column(10, 11))], max_held_bytes=10_000)
    assert book.resume(5) == []
    book.acknowledge(5)
    book.applied(column(12, 13))
    book.applied(column(14, 15))
    assert rows(book.resume(5)) == [(5, [15])]


def ahead(look_ahead: int = 2, *, next_step: int = 0, pending: int = 0) -> Ledger:
    return Ledger(next_step, look_ahead=look_ahead, pending=pending, max_held_bytes=10_000)


def test_a_look_ahead_keeps_answers_back_until_the_steps_behind_or_the_end_bring_them() -> None:
    book = ahead()
    assert book.applied(column(10)).tolist() == []
    assert (book.next_step, book.next_answer, book.pending) == (1, 0, 1)
    assert book.applied(column(11, 12, 13)).tolist() == [[12], [13]], "the outputs of 2 and 3 are about 0 and 1"
    assert (book.next_step, book.next_answer, book.pending) == (4, 2, 2)
    assert book.ended(column(14, 15)).tolist() == [[14], [15]]
    assert (book.next_step, book.next_answer, book.pending) == (4, 4, 0)
    assert book.applied(column(16, 17)).tolist() == [], "a new sequence"
    assert book.ended(column(18, 19)).tolist() == [[18], [19]]
    assert rows(book.resume(1)) == [(1, [13]), (2, [14, 15]), (4, [18, 19])]


def test_a_sequence_shorter_than_its_look_ahead_ends_with_as_many_answers_as_it_has_steps() -> None:
    book = ahead(3)
    book.applied(column(10))
    assert book.ended(column(11, 12, 13)).tolist() == [[13]]
    assert rows(book.resume(0)) == [(0, [13])]


def test_of_what_a_message_and_an_end_bring_only_the_last_row_is_held_where_no_more_is_wanted() -> None:
    book = ahead()
    assert book.applied(column(10, 11, 12, 13), last_only=True).tolist() == [[13]]
    assert book.ended(column(14, 15), last_only=True).tolist() == [[15]]
    assert rows(book.resume(0)) == [(1, [13]), (3, [15])]


def test_a_reset_that_nobody_waits_for_drops_what_was_pending() -> None:
    book = ahead()
    book.applied(column(10, 11))
    book.acknowledge(2)
    assert book.reset(2)
    assert (book.next_answer, book.pending) == (2, 0)
    assert book.resume(2) == []


def test_what_is_acknowledged_ahead_is_not_held() -> None:
    book = ahead()
    book.acknowledge(2)
    assert book.applied(column(10, 11, 12, 13)).tolist() == [[12], [13]]
    assert book.resume(2) == []
    with pytest.raises(ResumePointLost):
        book.resume(1)


def test_steps_that_are_sent_again_are_answered_with_what_they_brought() -> None:
    book = ahead()
    book.applied(column(10, 11, 12, 13, 14))
    until, again = book.answer_again(2, 4)
    assert (until, joined(again)[:, 0].tolist()) == (2, [12, 13])
    assert joined(book.answer_since(4))[:, 0].tolist() == [14]
    assert book.answer_again(0, 2) == (0, [])
    book.ended(column(15, 16))
    book.applied(column(17))
    assert book.answer_again(5, 6) == (5, []), "the first step of a sequence brings nothing"
    assert book.answer_since(5) == []


def test_a_client_that_is_ahead_after_a_crash_waits_for_the_answers_that_it_lacks() -> None:
    book = ahead(next_step=5, pending=2)
    assert book.resume(4) == []
    assert book.answered_step == 3
    book.acknowledge(4)
    book.applied(column(15, 16))
    assert rows(book.resume(4)) == [(4, [16])]


class ClientAndServer(RuleBasedStateMachine):
    """A client sends 1, 2, 3, … to a server that sums them up, loses answers and falls back to checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.server, self.total = ledger(), 0.0
        self.checkpoint: tuple[object, ...] = (0, 0, (), (), 0.0)
        self.durable_step = 0
        self.received: list[float] = []

    def apply(self, first_step: int, count: int) -> list[float]:
        """What the server does with a message; the rows of its answer."""
        new = self.server.new_steps(first_step, count)
        known = joined(self.server.answer_again(first_step, first_step + count - new)[1])
        outputs = self.total + np.cumsum(np.arange(first_step + count - new, first_step + count) + 1.0)
        if new:
            self.total = float(outputs[-1])
            fresh = outputs.astype(np.float32).reshape(-1, 1)
            self.server.applied(fresh)
        return [*(known[:, 0] if len(known) else []), *outputs]

    @rule(count=st.integers(1, 4), answer_is_lost=st.booleans())
    def send_the_next_steps(self, count: int, answer_is_lost: bool) -> None:
        if self.server.next_step > len(self.received):
            self.resume()
        answer = self.apply(len(self.received), count)
        if not answer_is_lost:
            self.received += answer

    @rule(back=st.integers(1, 6), count=st.integers(1, 4))
    def send_old_steps_again(self, back: int, count: int) -> None:
        first_step = max(0, self.server.next_step - back)
        before, steps = self.total, self.server.next_step
        count = min(count, steps - first_step)
        if count:
            answer = self.apply(first_step, count)
            assert (self.total, self.server.next_step) == (before, steps)
            assert answer == [
                float(sum(range(i + 2))) for i in range(first_step + count - len(answer), first_step + count)
            ]

    @rule()
    def acknowledge(self) -> None:
        self.server.acknowledge(len(self.received))

    @rule()
    def write_a_checkpoint(self) -> None:
        s = self.server
        self.checkpoint = (s.next_step, s.answered_step, s.held, s.resets, self.total)
        self.durable_step = s.next_step

    @rule()
    def crash(self) -> None:
        next_step, answered_step, held, resets, self.total = self.checkpoint  # type: ignore[assignment]
        self.server = Ledger(next_step, answered_step, held, resets, max_held_bytes=10_000)  # type: ignore[arg-type]
        self.resume()

    @rule()
    def resume(self) -> None:
        for answer in self.server.resume(len(self.received)):
            self.received += answer.outputs[:, 0].tolist()
        self.server.acknowledge(len(self.received))
        behind = len(self.received) - self.server.next_step
        if behind > 0:
            self.apply(self.server.next_step, behind)

    @rule()
    def both_crash(self) -> None:
        """A new client has the answers of the old one, but not its steps: it goes on where the server is."""
        next_step, answered_step, held, resets, self.total = self.checkpoint  # type: ignore[assignment]
        self.server = Ledger(next_step, answered_step, held, resets, max_held_bytes=10_000)  # type: ignore[arg-type]
        self.server.resume(len(self.received))
        if len(self.received) > self.server.next_step:
            del self.received[self.server.next_step :]
        self.resume()

    @invariant()
    def answers_are_the_running_sums_each_once(self) -> None:
        assert self.received == [float(sum(range(i + 2))) for i in range(len(self.received))]

    @invariant()
    def the_state_has_each_step_once(self) -> None:
        assert self.total == sum(range(self.server.next_step + 1))

    @invariant()
    def nothing_durable_is_lost(self) -> None:
        assert self.server.next_step >= self.durable_step


ClientAndServer.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestExactlyOnce = ClientAndServer.TestCase
