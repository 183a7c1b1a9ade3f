"""How a stream goes on after a cut: the bookkeeping against a small server inside the test, without I/O."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnserve import (
    Answer,
    Draining,
    Evicted,
    NotFinite,
    Notice,
    ResumePoint,
    ResumePointLost,
    RnnserveError,
    SessionLimit,
    SessionMoved,
    SessionNotFound,
    StreamClosed,
    TimedOut,
    Unreachable,
)
from rnnserve.bookkeepers import Exchange, StepsAhead
from rnnserve.exchange import CallEnded, InputsEnded, NextInput, Response
from rnnserve.replay import Message, Replay
from rnnserve.requests import steps_message
from rnnserve.retry import Resumption
from rnnserve.session import Session
from rnnserve.statuses import error_from_status
from rnnserve.tensors import array_from, sequence_tensor
from rnnserve.v1 import prediction_pb2
from rnnserve.v1 import real_time_service_pb2 as pb

BAD = -1.0
"""A value that the server refuses."""

Choose = Callable[[list[str]], str]
"""Picks one of several things that may happen next."""


@dataclass
class State:
    """What the server knows of the session: a sum, and the answers that are not acknowledged."""

    total: float = 0.0
    next_step: int = 0
    answers: dict[int, float] = field(default_factory=dict)


class Server:
    """Adds numbers up. It may lose the connection at any message, and fall back to its last checkpoint."""

    def __init__(self, durability: Literal["none", "process", "stored"] = "stored") -> None:
        self.durability = durability
        self.state: State | None = None
        self.stored: State | None = None
        self.token = b""
        self.opens: list[pb.OpenSession] = []
        self.applied: list[int] = []
        self.closed = False
        self.erases = True
        self.stores_each_step = False

    def checkpoint(self) -> list[pb.StreamStepsResponse]:
        if self.durability != "stored" or self.state is None:
            return []
        self.stored = copy.deepcopy(self.state)
        return [self._response(checkpoint=pb.Checkpoint())]

    def crash(self) -> None:
        self.state = copy.deepcopy(self.stored)

    def answer(self, request: pb.StreamStepsRequest) -> list[pb.StreamStepsResponse]:
        """Raises what ends the call."""
        if request.HasField("open"):
            return self._open(request)
        assert self.state is not None
        self._acknowledge(request.answered_step)
        if request.HasField("close"):
            assert request.close.first_step == self.state.next_step
            self.closed, self.state, self.stored = True, None, None
            return [pb.StreamStepsResponse(closed=pb.SessionClosed(erased=self.erases))]
        first = request.steps.first_step if request.HasField("steps") else request.reset.first_step
        if first != self.state.next_step:
            return [self._response(error=status("STEP_OUT_OF_ORDER"))]
        return [self._steps(request.steps) if request.HasField("steps") else self._reset()]

    def _open(self, request: pb.StreamStepsRequest) -> list[pb.StreamStepsResponse]:
        self.opens.append(copy.deepcopy(request.open))
        if self.state is None:
            if request.open.resume:
                raise error_from_status(status("SESSION_NOT_FOUND"))
            self.state, self.token = State(), request.open.resume_token
        assert request.open.resume_token == self.token
        self._acknowledge(request.answered_step)
        opened = pb.SessionOpened(
            next_step=self.state.next_step, durability=pb.Durability.Value(f"DURABILITY_{self.durability.upper()}")
        )
        missed = range(request.answered_step, self.state.next_step)
        if any(step not in self.state.answers for step in missed):
            raise error_from_status(status("RESUME_POINT_LOST"))
        pairs = [missed[i : i + 2] for i in range(0, len(missed), 2)]
        return [self._response(opened=opened), *(self._answers(pair.start, pair.stop) for pair in pairs)]

    def _acknowledge(self, answered_step: int) -> None:
        assert self.state is not None
        self.state.answers = {step: value for step, value in self.state.answers.items() if step >= answered_step}

    def _steps(self, steps: pb.Steps) -> pb.StreamStepsResponse:
        assert self.state is not None
        values = array_from(steps.tensor)[:, 0].tolist()
        if BAD in values:
            return self._response(error=status("NOT_FINITE"))
        for value in values:
            self.state.total += value
            self.state.answers[self.state.next_step] = self.state.total
            self.applied.append(self.state.next_step)
            self.state.next_step += 1
            if self.stores_each_step and self.state.next_step % 2:
                self.checkpoint()  # in the middle of a message, too
        return self._answers(steps.first_step, self.state.next_step)

    def _reset(self) -> pb.StreamStepsResponse:
        assert self.state is not None
        self.state.total = 0.0
        return self._response(reset=pb.SessionReset(next_step=self.state.next_step))

    def _answers(self, first: int, end: int) -> pb.StreamStepsResponse:
        assert self.state is not None
        outputs = sequence_tensor([[self.state.answers[step]] for step in range(first, end)])
        prediction = prediction_pb2.Prediction(outputs=outputs)
        return self._response(answer=pb.StepsAnswer(first_step=first, prediction=prediction, next_step=end))

    def _response(self, **kind: Any) -> pb.StreamStepsResponse:
        return pb.StreamStepsResponse(**kind, durable_step=self.stored.next_step if self.stored else 0)


def status(reason: str) -> Status:
    detail = Packed()
    detail.Pack(ErrorInfo(reason=reason, domain="rnnserve"))
    return Status(code=3, message=reason, details=[detail])


class Transport:
    """Does what turns say, between a bookkeeper and the server, one small thing at a time."""

    def __init__(self, server: Server, choose: Choose) -> None:
        self.server = server
        self.choose = choose
        self.requests: deque[pb.StreamStepsRequest] = deque()
        self.responses: deque[Response[pb.StreamStepsResponse] | CallEnded] = deque()
        self.ended = False

    def run(self, bookkeeper: Exchange, inputs: Iterable[Any] = (), ahead: int = 3) -> Iterator[Answer]:
        waiting = iter([*map(NextInput, inputs), InputsEnded()])
        places, fed = ahead, False
        turn = bookkeeper.begin()
        while True:
            if turn.reconnect_after_s is not None:
                self.cut()
                self.ended = False
            self.requests.extend([] if self.ended else turn.requests)
            places += turn.places
            yield from turn.results
            if bookkeeper.done:
                break
            event: Any = None
            while event is None:
                match self.choose(self._possible(places > 0 and not fed and isinstance(bookkeeper, StepsAhead))):
                    case "input":
                        event = next(waiting)
                        places, fed = places - 1, isinstance(event, InputsEnded)
                    case "response":
                        event = self.responses.popleft()
                    case action:
                        self._act(action)
            turn = bookkeeper.handle(event)
        if bookkeeper.failure is not None:
            raise bookkeeper.failure

    def _possible(self, is_hungry: bool) -> list[str]:
        possible = ["input"] if is_hungry else []
        possible += ["request"] if self.requests and not self.ended else []
        possible += ["response"] if self.responses else []
        return possible + ([] if self.ended else ["cut", "crash"]) + ["checkpoint"]

    def _act(self, action: str) -> None:
        if action == "request":
            try:
                self.responses.extend(map(Response, self.server.answer(self.requests.popleft())))
            except RnnserveError as error:
                self.end(error)
        elif action == "checkpoint":
            self.responses.extend([] if self.ended else map(Response, self.server.checkpoint()))
        elif action == "crash":
            self.server.crash()
            self.lose()
        else:
            self.lose()

    def lose(self, error: RnnserveError | None = None) -> None:
        """The connection breaks: what is under way is lost."""
        self.cut()
        self.end(error or Unreachable("gone"))

    def end(self, error: RnnserveError) -> None:
        self.ended = True
        self.requests.clear()
        self.responses.append(CallEnded(error))

    def cut(self) -> None:
        self.requests.clear()
        self.responses.clear()


def calmly(possible: list[str]) -> str:
    """Nothing goes wrong, and the server answers before anything else is sent."""
    for action in ("response", "request", "input", "checkpoint"):
        if action in possible:
            return action
    raise AssertionError("nothing can happen")


def new_session(**options: Any) -> Session:
    return Session("sum", 0, None, prediction_pb2.OutputOptions(steps=prediction_pb2.STEP_SELECTION_ALL), **options)


def opened(server: Server, **options: Any) -> tuple[Session, Transport]:
    session, transport = new_session(**options), Transport(server, calmly)
    assert list(transport.run(Exchange(session, session.open))) == []
    session.settle()
    return session, transport


def step(session: Session, transport: Transport, *values: float) -> list[tuple[int, float]]:
    rows = [[value] for value in values]
    exchange = Exchange(session, lambda: session.steps(rows), needs_room=True)
    answers = list(transport.run(exchange))
    session.settle()
    refusal = session.take_refusal()
    if refusal is not None:
        raise refusal
    return pairs(answers)


def pairs(answers: Iterable[Answer]) -> list[tuple[int, float]]:
    return [(answer.step, float(answer.output[0])) for answer in answers]


def reset(session: Session, transport: Transport) -> None:
    list(transport.run(Exchange(session, session.reset)))


def close(session: Session, transport: Transport) -> None:
    session.limit_closing(30.0)
    list(transport.run(Exchange(session, session.close)))


# What the caller wants: messages of some steps each, or a reset.
messages = st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, BAD]), min_size=1, max_size=4)
programs = st.lists(st.lists(messages, max_size=8), min_size=1, max_size=4)


def expected(program: list[list[list[float]]]) -> list[tuple[int, float]]:
    """What an exact accumulator says, with a reset behind each part, and without what is refused."""
    found: list[tuple[int, float]] = []
    for part in program:
        total = 0.0
        for message in part:
            for value in message if BAD not in message else []:
                total += value
                found.append((len(found), total))
    return found


def carried_out(program: list[list[list[float]]], session: Session, transport: Transport) -> list[tuple[int, float]]:
    """What comes out, where the caller skips each message that is refused and goes on behind it."""
    found: list[Answer] = []
    for part in program:
        left = list(part)
        while left:
            start = len(found)
            try:
                for answer in transport.run(StepsAhead(session), [[[value] for value in message] for message in left]):
                    session.hand_over(answer)
                    found.append(answer)
                left = []
            except NotFinite:
                session.settle()
                assert isinstance(session.take_refusal(), NotFinite)
                done = len(found) - start
                while done:
                    done -= len(left.pop(0))
                assert BAD in left.pop(0)
        assert session.next_step == len(found)
        reset(session, transport)
    return pairs(found)


@given(
    program=programs,
    seed=st.integers(0, 2**32),
    faults=st.integers(0, 12),
    durability=st.sampled_from(["process", "stored"]),
    stores_each_step=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_whatever_breaks_each_answer_comes_once_in_order_and_right(
    program: list[list[list[float]]],
    seed: int,
    faults: int,
    durability: Literal["process", "stored"],
    stores_each_step: bool,
) -> None:
    server, random = Server(durability), Random(seed)
    server.stores_each_step = stores_each_step
    session, transport = opened(server)
    left = {"cut": faults, "crash": faults if durability == "stored" else 0, "checkpoint": 40}

    def choose(possible: list[str]) -> str:
        action = random.choice([action for action in possible if left.get(action, 1) > 0])
        left[action] = left.get(action, 10_000) - 1
        return action

    transport.choose = choose
    assert carried_out(program, session, transport) == expected(program)
    transport.choose = calmly
    close(session, transport)
    assert server.closed


def test_without_a_crash_no_step_is_applied_twice() -> None:
    server = Server("process")
    session, transport = opened(server)
    step(session, transport, 1.0)
    answers_lost = iter(["request", "cut"])
    transport.choose = lambda possible: next(answers_lost, None) or calmly(possible)
    assert step(session, transport, 2.0, 3.0) == [(1, 3.0), (2, 6.0)]
    assert server.applied == [0, 1, 2]


def test_a_message_that_was_applied_in_part_is_sent_from_there_on() -> None:
    message = Message(4, 7, steps_message(4, [[1.0], [2.0], [3.0]])[0])
    assert array_from(message.part(5, 7).tensor).tolist() == [[2.0], [3.0]]
    assert message.part(5, 6).first_step == 5
    text = Message(2, 6, steps_message(2, "äbcd")[0])
    assert text.part(3, 6).text == "bcd"
    words = Message(2, 6, steps_message(2, " so they  say\nit", "word")[0], "word")
    assert (words.part(3, 6).text, words.part(2, 3).text) == ("they say it", "so")


def test_a_refused_step_is_not_sent_again_after_a_cut() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    with pytest.raises(NotFinite):
        step(session, transport, BAD)
    transport.lose()
    assert step(session, transport, 4.0) == [(1, 5.0)]
    assert server.applied == [0, 1]


def test_a_close_that_was_cut_is_sent_again() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    transport.lose()
    close(session, transport)
    assert server.closed


def test_a_stored_session_keeps_what_is_not_durable_though_the_store_is_down_when_it_is_resumed() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    for response in server.checkpoint():
        session.handle(response)
    server.durability = "process"
    transport.lose()
    assert step(session, transport, 2.0) == [(1, 3.0)]
    assert session.durability == "stored"
    server.crash()
    transport.lose()
    assert step(session, transport, 4.0) == [(2, 7.0)]


@pytest.mark.parametrize("erases", [True, False])
def test_a_notice_tells_that_the_server_may_still_have_the_session(erases: bool) -> None:
    server = Server()
    server.erases = erases
    session, transport = opened(server)
    step(session, transport, 1.0)
    close(session, transport)
    session.closed()
    assert [notice.reason for notice in session.notices] == ([] if erases else ["not_erased"])


def test_a_close_whose_answer_was_lost_finds_no_session_and_is_done() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    lost = iter(["request", "cut"])
    transport.choose = lambda possible: next(lost, None) or calmly(possible)
    close(session, transport)
    assert [opening.resume for opening in server.opens] == [False, True]
    assert session.failure is None


def test_a_full_replay_buffer_waits_for_a_checkpoint() -> None:
    server = Server()
    session, transport = opened(server, replay=Replay(limit_bytes=10))
    step(session, transport, 1.0)
    assert session.full
    ahead = StepsAhead(session)
    ahead.begin()
    assert not ahead.handle(NextInput([[2.0]])).requests
    assert not ahead.waiting, "the wait for room has no limit"
    assert not ahead.done
    (checkpoint,) = server.checkpoint()
    (request,) = ahead.handle(Response(checkpoint)).requests
    assert request.steps.first_step == 1
    assert session.durable_step == 1


def test_without_a_checkpoint_a_full_replay_buffer_says_so_and_the_stream_stays_usable() -> None:
    server = Server()
    session, transport = opened(server, replay=Replay(limit_bytes=10))
    step(session, transport, 1.0)
    exchange = Exchange(session, lambda: session.steps([[2.0]]), needs_room=True)
    assert not exchange.begin().requests
    exchange.handle(CallEnded(TimedOut("late")))
    assert isinstance(exchange.failure, TimedOut)
    assert "replay buffer" in str(exchange.failure)
    assert step(session, transport, 2.0) == [(1, 3.0)]  # behind the checkpoint that comes now


def test_a_full_replay_buffer_may_drop_instead_and_then_a_crash_is_a_lost_resume_point() -> None:
    server = Server()
    session, transport = opened(server, replay=Replay(limit_bytes=10, when_full="drop"))
    server.checkpoint()
    assert [step(session, transport, 1.0) for _ in range(3)] == [[(i, i + 1.0)] for i in range(3)]
    server.crash()
    transport.lose()
    with pytest.raises(ResumePointLost, match="lost the steps from 0"):
        step(session, transport, 1.0)


def test_a_server_that_is_further_than_what_was_sent_is_a_lost_resume_point() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    assert server.state is not None
    server.state.next_step, server.state.answers = 9, dict.fromkeys(range(9), 0.0)
    transport.lose()
    with pytest.raises(ResumePointLost, match="expects step 9, but only"):
        step(session, transport, 1.0)


def test_a_server_that_crashed_before_its_first_checkpoint_gets_everything_again() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0, 2.0)
    server.crash()
    transport.lose()
    assert step(session, transport, 3.0) == [(2, 6.0)]
    assert [opening.resume for opening in server.opens] == [False, False]


def test_where_nothing_was_sent_yet_the_session_is_begun_anew() -> None:
    server = Server("process")
    session, transport = opened(server)
    server.crash()
    transport.lose()
    assert step(session, transport, 3.0) == [(0, 3.0)]


def test_a_session_that_died_with_its_server_is_not_found() -> None:
    server = Server("process")
    session, transport = opened(server)
    step(session, transport, 1.0)
    server.crash()
    transport.lose()
    with pytest.raises(SessionNotFound):
        step(session, transport, 1.0)


def test_a_stream_goes_on_from_the_resume_point_of_another_and_gets_what_that_missed() -> None:
    server = Server("process")
    session, transport = opened(server)
    step(session, transport, 1.0)
    transport.requests.append(session.steps([[2.0], [3.0]]))
    transport._act("request")
    point = ResumePoint(*session.resume_point)
    assert point.answered_step == 1
    other, wire = new_session(resume=point), Transport(server, calmly)
    assert pairs(wire.run(Exchange(other, other.open))) == [(1, 3.0), (2, 6.0)]
    other.settle()
    assert (other.next_step, other.resume_point.answered_step, server.opens[-1].resume) == (3, 3, True)
    assert step(other, wire, 4.0) == [(3, 10.0)]


def test_the_server_is_told_only_of_answers_that_the_caller_has() -> None:
    server = Server()
    session, transport = opened(server)
    answers = transport.run(StepsAhead(session), [[[1.0], [2.0], [3.0]]])
    session.hand_over(next(answers))
    assert (session.answered_step, session.resume_point.answered_step) == (3, 1)


def test_a_hole_in_the_answers_is_no_answer() -> None:
    session, _ = opened(Server())
    session.steps([[1.0]])
    session.steps([[2.0]])
    outputs = prediction_pb2.Prediction(outputs=sequence_tensor([[3.0]]))
    turn = session.handle(pb.StreamStepsResponse(answer=pb.StepsAnswer(first_step=1, prediction=outputs, next_step=2)))
    assert not turn.results
    assert isinstance(session.failure, ResumePointLost)
    assert "left out the answers from step 0 on" in str(session.failure)


def test_two_resets_in_a_row_and_a_cut_are_still_one_reset() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    reset(session, transport)
    reset(session, transport)
    server.crash()
    transport.lose()
    assert step(session, transport, 2.0) == [(1, 2.0)]


@pytest.mark.parametrize(
    "error",
    [
        Draining("going", retry_after_s=1.0),
        TimedOut("late"),
        Evicted("too many", metadata={"resumable": "true"}),
        StreamClosed("ended", code="OK"),
    ],
)
def test_what_the_session_survives_is_resumed(error: RnnserveError) -> None:
    session, _ = opened(Server("process"))
    turn = session.cut(error)
    assert turn.reconnect_after_s is not None
    assert turn.reconnect_after_s >= (error.retry_after_s or 0.0)
    assert session.failure is None


@pytest.mark.parametrize(
    "error",
    [
        Evicted("gone for good", metadata={"resumable": "false"}),
        StreamClosed("cancelled", code="CANCELLED"),
        RnnserveError("unknown"),
    ],
)
def test_what_it_does_not_survive_is_raised(error: RnnserveError) -> None:
    session, _ = opened(Server("process"))
    assert session.cut(error).reconnect_after_s is None
    assert session.failure is error


def test_a_stream_that_was_moved_asks_once_whether_another_caller_has_the_session() -> None:
    session, _ = opened(Server("process"))
    moved = SessionMoved("elsewhere")
    turn = session.cut(moved)  # perhaps by an open of our own that came late
    assert turn.reconnect_after_s is not None
    assert not turn.requests[0].open.take_over
    assert session.cut(moved).reconnect_after_s is None
    assert session.failure is moved


@pytest.mark.parametrize("durability", ["none", "process"])
def test_without_a_token_or_without_time_nothing_is_resumed(durability: Literal["none", "process"]) -> None:
    session, _ = opened(Server(durability), resume_timeout_s=0.0 if durability == "process" else 60.0)
    assert session.cut(Unreachable("gone")).reconnect_after_s is None
    assert isinstance(session.failure, Unreachable)


def test_the_first_open_is_tried_again_where_no_server_answers() -> None:
    session = new_session(open_attempts=3)
    first = session.open()
    turns = [session.cut(Unreachable("gone")) for _ in range(3)]
    assert [list(turn.requests) for turn in turns] == [[first], [first], []]
    assert isinstance(session.failure, Unreachable)


@pytest.mark.parametrize("other_connections", [True, False])
def test_the_first_open_is_tried_again_after_a_time_out_only_on_another_connection(other_connections: bool) -> None:
    session = new_session(open_attempts=2, other_connections=other_connections)
    first = session.open()
    assert list(session.cut(TimedOut("stuck")).requests) == ([first] if other_connections else [])
    assert not session.cut(TimedOut("stuck")).requests
    assert isinstance(session.failure, TimedOut)


def test_the_first_open_is_not_tried_again_where_a_server_refuses_it() -> None:
    session = new_session(open_attempts=3)
    session.open()
    assert not session.cut(SessionLimit("full")).requests
    assert isinstance(session.failure, SessionLimit)


def test_the_pauses_grow_to_two_seconds_and_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("rnnserve.retry.time.monotonic", lambda: now_s)
    resumption = Resumption(60.0)
    for longest_s in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0):
        assert longest_s / 2 <= (resumption.pause_s(None) or 0.0) <= longest_s
    assert resumption.pause_s(30.0) == 2.0
    now_s += 60.0
    assert resumption.pause_s(None) is None
    resumption.progress()
    assert resumption.pause_s(None) is not None
    resumption.limit(1.0)
    resumption.progress()
    now_s += 1.0
    assert resumption.pause_s(None) is None


def test_the_token_is_random_and_travels_with_each_open() -> None:
    first, second = new_session().open(), new_session().open()
    assert len(first.open.resume_token) == 16
    assert first.open.resume_token != second.open.resume_token
    assert new_session(durable=True).open().open.require_durable


def test_a_resume_point_names_its_session() -> None:
    with pytest.raises(ValueError, match="resume point"):
        Session("sum", 0, "other", prediction_pb2.OutputOptions(), resume=ResumePoint("mine", "00" * 16, 0))
    with pytest.raises(ValueError, match="hex"):
        new_session(resume=ResumePoint("mine", "no", 0))
    assert np.isclose(new_session(resume=ResumePoint("mine", "00" * 16, 4)).open().answered_step, 4)


def test_a_replay_buffer_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="replay_buffer_bytes must be 0 or more, not -1"):
        Replay(-1)


def resumed(server: Server, point: ResumePoint) -> tuple[Session, Transport]:
    """What a new process does with the point of another one; it drops the answers that were missed."""
    session, transport = new_session(resume=point), Transport(server, calmly)
    list(transport.run(Exchange(session, session.open)))
    session.settle()
    return session, transport


def test_only_the_first_open_of_a_resume_point_takes_the_session_from_another_caller() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    session, transport = resumed(server, session.resume_point)
    session.cut(Unreachable("gone"))
    first, second, third = server.opens[0], server.opens[1], session.open().open
    assert [first.take_over, second.take_over, third.take_over] == [False, True, False]
    assert first.caller_id != second.caller_id == third.caller_id


def test_what_can_be_sent_again_from_its_beginning_is_rebuilt_until_a_checkpoint_has_replaced_it() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    (request,) = session.cut(Unreachable("gone")).requests
    assert (request.open.resume, request.open.rebuild) == (False, True)
    session, transport = opened(server := Server())
    step(session, transport, 1.0)
    server.checkpoint()
    step(session, transport, 2.0)
    (request,) = session.cut(Unreachable("gone")).requests
    assert (request.open.resume, request.open.rebuild) == (True, False)


def test_a_new_session_is_no_rebuilt_one() -> None:
    assert not new_session().open().open.rebuild


def test_a_resume_point_behind_a_reset_does_it_again() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 5.0)
    server.checkpoint()
    assert list(transport.run(Exchange(session, session.reset))) == []
    point = session.resume_point
    server.crash()
    session, transport = resumed(server, point)
    assert step(session, transport, 1.0) == [(1, 1.0)]
    assert not session.resume_point.reset


def test_a_reset_that_later_steps_have_followed_is_not_done_again() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 5.0)
    assert list(transport.run(Exchange(session, session.reset))) == []
    point = session.resume_point
    step(session, transport, 1.0)
    session, transport = resumed(server, point)
    assert step(session, transport, 2.0) == [(2, 3.0)]


def test_who_has_answers_to_steps_that_the_server_lost_learns_where_to_go_on() -> None:
    server = Server()
    session, transport = opened(server)
    step(session, transport, 1.0)
    server.checkpoint()
    step(session, transport, 2.0)
    point = session.resume_point
    server.crash()
    with pytest.raises(ResumePointLost) as lost:
        resumed(server, point)
    assert lost.value.metadata == {"expected_step": "1"}
    session, transport = resumed(server, point._replace(answered_step=1))
    assert step(session, transport, 3.0) == [(1, 4.0)]


def test_once_the_store_works_again_a_session_survives_a_crash() -> None:
    server = Server("process")
    session, transport = opened(server)
    step(session, transport, 1.0)
    server.durability = "stored"
    (checkpoint,) = server.checkpoint()
    session.receive(checkpoint)
    assert session.durability == "stored"
    step(session, transport, 2.0)
    server.crash()
    transport.lose()
    assert step(session, transport, 3.0) == [(2, 6.0)]


def reasons(session: Session) -> list[str]:
    return [notice.reason for notice in session.notices]


def test_a_stream_says_what_interrupted_it_and_with_which_step_it_goes_on() -> None:
    server, told = Server(), list[Notice]()
    session, transport = opened(server, on_notice=told.append)
    step(session, transport, 1.0)
    server.checkpoint()
    step(session, transport, 2.0)
    server.crash()
    error = Unreachable("no server answers at pump:1 (refused); start one")
    transport.lose(error)
    step(session, transport, 3.0)
    assert told == session.notices
    assert told == [
        Notice(
            "interrupted",
            "the stream is interrupted and tries to resume: no server answers at pump:1 (refused)",
            error=error,
        ),
        Notice("resumed", "the stream goes on with step 1", step=1),
    ]


def test_an_interruption_is_told_before_the_wait_and_once_however_often_it_is_tried_to_resume() -> None:
    session, _ = opened(server := Server())
    session.cut(Unreachable("gone"))
    assert reasons(session) == ["interrupted"]
    session.cut(Unreachable("refused"))
    (request,) = session.cut(Draining("going")).requests
    assert reasons(session) == ["interrupted"]
    (response,) = server.answer(request)
    session.handle(response)
    assert reasons(session) == ["interrupted", "resumed"]


def test_each_interruption_is_told() -> None:
    session, transport = opened(Server())
    for value in (1.0, 2.0):
        transport.lose()
        step(session, transport, value)
    assert reasons(session) == ["interrupted", "resumed"] * 2


def test_an_interrupted_stream_is_closed_with_notices_too() -> None:
    session, transport = opened(Server())
    transport.lose()
    close(session, transport)
    assert reasons(session) == ["interrupted", "resumed"]


def test_a_stream_that_cannot_resume_raises_and_is_never_called_resumed() -> None:
    server = Server()
    session, transport = opened(server, replay=Replay(limit_bytes=10, when_full="drop"))
    server.checkpoint()
    for _ in range(3):
        step(session, transport, 1.0)
    server.crash()
    transport.lose()
    with pytest.raises(ResumePointLost):
        step(session, transport, 1.0)
    assert reasons(session) == ["interrupted"]


def test_a_stream_that_does_not_try_to_resume_gives_no_notice() -> None:
    session, _ = opened(Server("none"))
    session.cut(Unreachable("gone"))
    assert (type(session.failure), session.notices) == (Unreachable, [])


def test_a_first_open_interrupts_nothing() -> None:
    session = new_session(open_attempts=3)
    session.open()
    session.cut(Unreachable("gone"))
    assert session.notices == []


def test_a_callback_that_fails_keeps_no_stream_from_resuming(caplog: pytest.LogCaptureFixture) -> None:
    def fail(notice: Notice) -> None:
        raise OSError(notice.reason)

    session, transport = opened(Server(), on_notice=fail)
    step(session, transport, 1.0)
    transport.lose()
    assert step(session, transport, 2.0) == [(1, 3.0)]
    assert reasons(session) == ["interrupted", "resumed"]
    assert len(caplog.records) == 2
