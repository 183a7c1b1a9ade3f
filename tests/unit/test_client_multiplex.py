"""Many sessions on one call: the bookkeeping against a small server inside the test, without I/O."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import given, settings
from hypothesis import strategies as st

from rnnserve import (
    BatchAnswer,
    Draining,
    Evicted,
    FieldInvalid,
    NotFinite,
    Notice,
    ResumePoint,
    ResumePointLost,
    RnnserveError,
    SessionExists,
    SessionMoved,
    SessionNotFound,
    ShapeMismatch,
    TimedOut,
    Unreachable,
)
from rnnserve.batches import Batch, BatchReplay
from rnnserve.exchange import CallEnded, Response, TimePassed
from rnnserve.multiplex_waits import Wait
from rnnserve.multiplexed import Multiplexed
from rnnserve.session_table import SessionTable
from rnnserve.statuses import error_from_status
from rnnserve.tensors import array_from, rows_array, sequence_tensor
from rnnserve.v1 import prediction_pb2
from rnnserve.v1 import real_time_service_pb2 as pb

BAD = -1.0
"""A value that the server refuses."""

Choose = Callable[[list[str]], str]
"""Picks one of several things that may happen next."""

Step = float | Literal["reset", "close"]


class Clock:
    """Time passes only where somebody waits for it."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[Clock]:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("multiplexed", "multiplex_waits", "retry"):
            patch.setattr(f"rnnserve.{module}.time", clock)
        yield clock


@dataclass
class State:
    """What the server knows of a session: a sum, and the answers that are not acknowledged."""

    token: bytes
    total: float = 0.0
    next_step: int = 0
    answers: dict[int, float] = field(default_factory=dict)

    def acknowledge(self, answered_step: int) -> None:
        self.answers = {step: value for step, value in self.answers.items() if step >= answered_step}


@dataclass
class Handle:
    session: str
    waiting: deque[tuple[int, Step]] = field(default_factory=deque)


class Server:
    """Adds numbers up, each handle for itself. It may lose the call, and fall back to its last checkpoint."""

    max_outstanding = 3
    max_steps = 256
    version = 1

    def __init__(self, durability: Literal["none", "process", "stored"] = "stored") -> None:
        self.durability = durability
        self.states: dict[str, State] = {}
        self.stored: dict[str, State] = {}
        self.handles: dict[int, Handle] = {}
        self.last_handle = -1
        self.opens: list[pb.OpenSession] = []
        self.batches: list[pb.StepBatch] = []
        self.applied: list[tuple[str, int]] = []
        self.refuses: dict[str, Status] = {}
        self.erases = True

    def begin_call(self) -> None:
        self.handles.clear()
        self.last_handle = -1

    def crash(self) -> None:
        self.states = copy.deepcopy(self.stored)

    def checkpoint(self) -> list[pb.MultiplexStepsResponse]:
        if self.durability != "stored":
            return []
        self.stored = copy.deepcopy(self.states)
        news = {number: self._durable(handle.session) for number, handle in self.handles.items()}
        durable = pb.HandlesDurable(handles=news.keys(), durable_steps=news.values())
        return [pb.MultiplexStepsResponse(durable=durable)] if news else []

    def end(self, session: str, why: Status) -> list[pb.MultiplexStepsResponse]:
        """Its handle has no session any more."""
        numbers = [number for number, handle in self.handles.items() if handle.session == session]
        for number in numbers:
            del self.handles[number]
        return [pb.MultiplexStepsResponse(ended=pb.HandlesEnded(handles=numbers, error=why))] if numbers else []

    def take(self, request: pb.MultiplexStepsRequest) -> list[pb.MultiplexStepsResponse]:
        match request.WhichOneof("request"):
            case "open":
                return [self._open(request.open)]
            case "steps":
                return self._take_steps(request.steps)
            case "reset":
                return self._wait(request.reset.handle, request.reset.reset.first_step, "reset")
            case "close":
                return self._wait(request.close.handle, request.close.close.first_step, "close")
        raise AssertionError("an empty request")

    def work(self, numbers: Sequence[int]) -> list[pb.MultiplexStepsResponse]:
        """Answers one request of each of these handles that has one; steps in one message."""
        answer = pb.StepBatchAnswer()
        outputs: list[list[float]] = []
        others: list[pb.MultiplexStepsResponse] = []
        for number in numbers:
            handle = self.handles[number]
            first, step = handle.waiting.popleft()
            state = self.states[handle.session]
            if first != state.next_step:
                others.append(self._refusal(number, first, "STEP_OUT_OF_ORDER"))
            elif step == "reset":
                state.total = 0.0
                reset = pb.HandleReset(handle=number, next_step=first, durable_step=self._durable(handle.session))
                others.append(pb.MultiplexStepsResponse(reset=reset))
            elif step == "close":
                del self.handles[number], self.states[handle.session]
                self.stored.pop(handle.session, None)
                closed = pb.SessionClosed(next_step=first, erased=self.erases)
                others.append(pb.MultiplexStepsResponse(closed=pb.HandleClosed(handle=number, closed=closed)))
            elif step == BAD:
                others.append(self._refusal(number, first, "NOT_FINITE"))
            else:
                outputs.append([self._apply(handle.session, state, step)])
                answer.handles.append(number)
                answer.first_steps.append(first)
                answer.durable_steps.append(self._durable(handle.session))
        if outputs:
            answer.prediction.outputs.CopyFrom(sequence_tensor(outputs))
            answer.prediction.labels.extend(f"at {total:g}" for (total,) in outputs)
            others.append(pb.MultiplexStepsResponse(answer=answer))
        return others

    @property
    def busy(self) -> list[int]:
        """Handles with something to do."""
        return [number for number, handle in self.handles.items() if handle.waiting]

    def _apply(self, session: str, state: State, value: float) -> float:
        self.applied.append((session, state.next_step))
        state.total += value
        state.answers[state.next_step] = state.total
        state.next_step += 1
        return state.total

    def _open(self, request: pb.OpenHandle) -> pb.MultiplexStepsResponse:
        assert request.handle > self.last_handle
        self.last_handle, wanted = request.handle, request.open
        self.opens.append(copy.deepcopy(wanted))
        state = self.states.get(wanted.session_id)
        why = self.refuses.get(wanted.session_id)
        if state is not None and state.token != wanted.resume_token:
            why = status("SESSION_EXISTS")
        elif state is None and wanted.resume:
            why = status("SESSION_NOT_FOUND")
        if why is not None:
            return pb.MultiplexStepsResponse(ended=pb.HandlesEnded(handles=[request.handle], error=why))
        if state is None:
            state = self.states[wanted.session_id] = State(wanted.resume_token)
        state.acknowledge(request.answered_step)
        self.handles[request.handle] = Handle(wanted.session_id)
        opened = pb.HandleOpened(
            handle=request.handle,
            durable_step=self._durable(wanted.session_id),
            max_outstanding_steps=self.max_outstanding,
            opened=pb.SessionOpened(
                version=self.version,
                next_step=state.next_step,
                max_steps_per_message=self.max_steps,
                max_message_bytes=1 << 20,
                durability=pb.Durability.Value(f"DURABILITY_{self.durability.upper()}"),
            ),
        )
        missed = range(request.answered_step, state.next_step)
        for first in missed[::2]:
            steps = [step for step in (first, first + 1) if step in missed]
            outputs = sequence_tensor([[state.answers[step]] for step in steps])
            prediction = prediction_pb2.Prediction(outputs=outputs, labels=["missed"] * len(steps))
            opened.missed.append(pb.StepsAnswer(first_step=first, prediction=prediction, next_step=steps[-1] + 1))
        return pb.MultiplexStepsResponse(opened=opened)

    def _take_steps(self, batch: pb.StepBatch) -> list[pb.MultiplexStepsResponse]:
        self.batches.append(copy.deepcopy(batch))
        assert len(set(batch.handles)) == len(batch.handles) <= self.max_steps
        values = array_from(batch.tensor)[:, 0].tolist()
        refused: list[pb.MultiplexStepsResponse] = []
        for row in zip(batch.handles, batch.first_steps, batch.answered_steps, values, strict=True):
            number, first, answered_step, value = row
            if number in self.handles:
                self.states[self.handles[number].session].acknowledge(answered_step)
            refused += self._wait(number, first, value)
        return refused

    def _wait(self, number: int, first: int, step: Step) -> list[pb.MultiplexStepsResponse]:
        if number not in self.handles:
            return [self._refusal(number, first, "SESSION_NOT_FOUND")]
        self.handles[number].waiting.append((first, step))
        assert len(self.handles[number].waiting) <= self.max_outstanding
        return []

    def _refusal(self, number: int, first: int, reason: str) -> pb.MultiplexStepsResponse:
        next_step = self.states[self.handles[number].session].next_step if number in self.handles else 0
        refused = pb.HandlesRefused(handles=[number], first_steps=[first], next_steps=[next_step], error=status(reason))
        return pb.MultiplexStepsResponse(refused=refused)

    def _durable(self, session: str) -> int:
        return self.stored[session].next_step if session in self.stored else 0


def status(reason: str, retry_after_s: float | None = None, **metadata: str) -> Status:
    details = [Packed(), Packed()]
    details[0].Pack(ErrorInfo(reason=reason, domain="rnnserve", metadata=metadata))
    if retry_after_s is None:
        return Status(code=3, message=reason, details=details[:1])
    retry = RetryInfo()
    retry.retry_delay.FromMilliseconds(int(1000 * retry_after_s))
    details[1].Pack(retry)
    return Status(code=14, message=reason, details=details)


class Gateway:
    """What `Multiplex` is, with a call to the small server on which one small thing happens at a time."""

    def __init__(self, server: Server, choose: Choose | None = None, **options: Any) -> None:
        self.server = server
        self.choose = choose or calmly
        self.random = Random(0)
        answer_options = prediction_pb2.OutputOptions(steps=prediction_pb2.STEP_SELECTION_ALL)
        self.sessions = Multiplexed("sum", 0, answer_options, **options)
        self.requests: deque[pb.MultiplexStepsRequest] = deque()
        self.responses: deque[Response[pb.MultiplexStepsResponse] | CallEnded] = deque()
        self.ended = False
        server.begin_call()

    def open(self, *names: str) -> None:
        numbers = self.sessions.numbers(names)
        self.run(Wait(self.sessions, partial(self.sessions.table.are_begun, numbers)))
        self._raise_error(numbers)

    def step(self, **values: float) -> BatchAnswer:
        names, numbers, make = self._made(values)
        first_steps = self.sessions.table.next_step[numbers]
        settled = partial(self.sessions.table.are_settled, numbers, first_steps)
        self.run(Wait(self.sessions, settled, make, partial(self._may_send, numbers)))
        return self.sessions.take_steps(names, numbers, first_steps)

    def send(self, **values: float) -> None:
        _, numbers, make = self._made(values)
        self.run(Wait(self.sessions, lambda: True, make, partial(self._may_send, numbers)))

    def receive(self) -> BatchAnswer | None:
        self.run(Wait(self.sessions, lambda: self.sessions.has_news or not self.sessions.pending))
        return self.sessions.take()

    def receive_all(self) -> list[BatchAnswer]:
        return list(iter(self.receive, None))

    def reset(self, *names: str) -> None:
        numbers = self.sessions.numbers(names)
        idle = partial(self.sessions.table.are_idle, numbers)
        self.run(Wait(self.sessions, idle, partial(self.sessions.reset, numbers)))
        self._raise_error(numbers)

    def close(self, *names: str) -> None:
        numbers = self.sessions.known(names)
        self.run(Wait(self.sessions, partial(self.sessions.table.are_idle, numbers)))
        over = partial(self.sessions.table.are_over, numbers)
        self.run(Wait(self.sessions, over, partial(self.sessions.close, numbers)))
        self.sessions.forget(numbers)

    def say(self, *responses: pb.MultiplexStepsResponse) -> None:
        """The server sends something by itself."""
        self.responses.extend(map(Response, responses))

    def lose(self, error: RnnserveError | None = None) -> None:
        """The connection breaks: what is under way is lost."""
        self.requests.clear()
        self.responses = deque([CallEnded(error or Unreachable("gone"))])
        self.ended = True
        self.server.begin_call()

    def run(self, wait: Wait) -> None:
        turn = wait.begin()
        while True:
            if turn.reconnect_after_s is not None:
                self.responses.clear()
                self.ended = False
            self.requests.extend([] if self.ended else turn.requests)
            if wait.done:
                break
            turn = wait.handle(self._next_event(turn.wake_after_s))
        if wait.failure is not None:
            raise wait.failure

    def _next_event(self, wake_after_s: float | None) -> Any:
        while True:
            action = self.choose(self._possible(wake_after_s))
            match action:
                case "response":
                    return self.responses.popleft()
                case "time":
                    Clock.now_s += wake_after_s or 0.0
                    return TimePassed()
                case "request":
                    self.say(*self.server.take(self.requests.popleft()))
                case "work":
                    busy = self.server.busy
                    self.say(*self.server.work(self.random.sample(busy, self.random.randint(1, len(busy)))))
                case "all work":
                    self.say(*self.server.work(self.server.busy))
                case "checkpoint":
                    self.say(*self.server.checkpoint())
                case "evict":
                    session = self.random.choice(list(self.server.handles.values())).session
                    self.say(*self.server.end(session, status("EVICTED", resumable="true")))
                case "crash":
                    self.server.crash()
                    self.lose()
                case "cut":
                    self.lose()

    def _possible(self, wake_after_s: float | None) -> list[str]:
        possible = ["response"] if self.responses else []
        possible += ["time"] if wake_after_s is not None and not self.responses else []
        if self.ended:
            return possible
        possible += ["request"] if self.requests else []
        possible += ["work", "all work"] if self.server.busy else []
        possible += ["evict"] if self.server.handles else []
        return [*possible, "checkpoint", "crash", "cut"]

    def _made(self, values: dict[str, float]) -> tuple[list[str], Any, Callable[[], None]]:
        numbers = self.sessions.numbers(list(values))
        inputs = rows_array([[value] for value in values.values()], len(values))
        return list(values), numbers, partial(self.sessions.steps, numbers, inputs)

    def _may_send(self, numbers: Any) -> bool:
        return not self.sessions.full and self.sessions.table.have_room(numbers)

    def _raise_error(self, numbers: Any) -> None:
        error = self.sessions.take_error(numbers)
        if error is not None:
            raise error


def calmly(possible: list[str]) -> str:
    """Nothing goes wrong, and the server answers before anything else is sent."""
    for action in ("response", "request", "all work", "time", "checkpoint"):
        if action in possible:
            return action
    raise AssertionError("nothing can happen")


def rows(answer: BatchAnswer | None) -> list[tuple[str, int, float]]:
    """The rows with an answer."""
    assert answer is not None
    columns = zip(answer.sessions, answer.steps.tolist(), answer.outputs[:, :1].tolist(), strict=True)
    return [(name, step, output[0]) for name, step, output in columns if step >= 0]


def all_rows(answers: Sequence[BatchAnswer]) -> list[tuple[str, int, float]]:
    return [row for answer in answers for row in rows(answer)]


class Accumulators:
    """What the answers must be: each session's sums, without what was sent from a refused step until it was told."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.next_steps: dict[str, int] = {}
        self.due: dict[tuple[str, int], float] = {}
        self.refused: set[str] = set()

    def sent(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if value == BAD:
                self.refused.add(name)
            if name not in self.refused:
                self.totals[name] = self.totals.get(name, 0.0) + value
                self.due[name, self.next_steps.get(name, 0)] = self.totals[name]
                self.next_steps[name] = self.next_steps.get(name, 0) + 1

    def told(self, answer: BatchAnswer | None) -> None:
        if answer is None:
            return
        for name, step, total in rows(answer):
            assert self.due.pop((name, step)) == total
        for name, error in answer.errors.items():
            assert isinstance(error, NotFinite)
            self.refused.remove(name)


values_of_some = st.dictionaries(
    st.sampled_from("abcd"), st.sampled_from([1.0, 2.0, 3.0, 5.0, BAD]), min_size=1, max_size=4
)
operations: st.SearchStrategy[tuple[str, dict[str, float]]] = st.one_of(
    st.tuples(st.sampled_from(["step", "send", "send"]), values_of_some),
    st.tuples(st.just("receive"), st.just({})),
    st.tuples(st.just("reset"), values_of_some),
)


@given(
    program=st.lists(operations, max_size=25),
    seed=st.integers(0, 2**32),
    faults=st.integers(0, 8),
    durability=st.sampled_from(["process", "stored"]),
)
@settings(max_examples=400, deadline=None)
def test_whatever_breaks_each_session_gets_each_answer_once_and_right(
    program: list[tuple[str, dict[str, float]]],
    seed: int,
    faults: int,
    durability: Literal["process", "stored"],
) -> None:
    server, random = Server(durability), Random(seed)
    left = {"cut": faults, "crash": faults if durability == "stored" else 0, "evict": faults, "checkpoint": 30}

    def choose(possible: list[str]) -> str:
        may = [action for action in possible if left.get(action, 1) > 0]
        action = random.choice(may) if may else "checkpoint"
        left[action] = left.get(action, 10_000) - 1
        return action

    gateway, truth = Gateway(server, choose, open_attempts=100), Accumulators()
    for operation, values in program:
        if operation == "reset":
            reset(gateway, truth, values)
        elif operation == "receive":
            truth.told(gateway.receive())
        else:
            truth.sent(values)
            if operation == "step":
                truth.told(gateway.step(**values))
            else:
                gateway.send(**values)
    for answer in gateway.receive_all():
        truth.told(answer)
    assert not truth.due
    assert not truth.refused
    assert {name: state.next_step for name, state in server.states.items() if state.next_step} == truth.next_steps
    assert {name: server.states[name].total for name in truth.totals} == truth.totals
    gateway.choose = calmly
    gateway.close(*gateway.sessions.names)
    assert not server.states


def reset(gateway: Gateway, truth: Accumulators, names: dict[str, float]) -> None:
    """One after the other, so that a refusal of the steps before is told of each."""
    for name in names:
        try:
            gateway.reset(name)
            truth.totals[name] = 0.0
            assert name not in truth.refused
        except NotFinite:
            truth.refused.remove(name)


def test_a_step_of_each_session_is_one_message_and_the_answers_are_in_its_order() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.open("a", "b", "c")
    answer = gateway.step(c=3.0, a=1.0, b=2.0)
    assert rows(answer) == [("c", 0, 3.0), ("a", 0, 1.0), ("b", 0, 2.0)]
    assert (answer.labels, answer.probabilities, answer.errors) == (("at 3", "at 1", "at 2"), None, {})
    assert len(server.batches) == 1


def test_answers_that_come_in_parts_and_in_another_order_are_put_in_the_callers_order() -> None:
    gateway = Gateway(Server(), lambda possible: "work" if "work" in possible else calmly(possible))
    for step in range(1, 10):
        answer = gateway.step(a=1.0, b=2.0, c=3.0, d=4.0)
        assert rows(answer) == [
            (name, step - 1, value * step) for name, value in zip("abcd", (1, 2, 3, 4), strict=True)
        ]
        assert answer.labels == tuple(f"at {value * step:g}" for value in (1, 2, 3, 4))


def test_sessions_begin_with_their_first_step() -> None:
    gateway = Gateway(Server())
    assert rows(gateway.step(a=1.0)) == [("a", 0, 1.0)]
    assert rows(gateway.step(b=5.0, a=1.0)) == [("b", 0, 5.0), ("a", 1, 2.0)]
    assert gateway.sessions.names == ["a", "b"]


def test_a_refused_row_costs_the_others_nothing_and_can_be_sent_again() -> None:
    gateway = Gateway(Server())
    gateway.open("a", "b", "c")
    answer = gateway.step(a=1.0, b=BAD, c=3.0)
    assert rows(answer) == [("a", 0, 1.0), ("c", 0, 3.0)]
    assert answer.sessions == ("a", "b", "c")
    assert (answer.steps[1], answer.labels[1], np.isnan(answer.outputs[1]).all()) == (-1, None, True)
    assert [(name, type(error)) for name, error in answer.errors.items()] == [("b", NotFinite)]
    assert rows(gateway.step(a=1.0, b=2.0)) == [("a", 1, 2.0), ("b", 0, 2.0)]


def test_where_no_session_ever_had_an_answer_there_are_no_outputs_to_be_nan() -> None:
    answer = Gateway(Server()).step(a=BAD)
    assert (answer.outputs.shape, answer.steps.tolist(), answer.labels) == ((1, 0), [-1], (None,))


def test_what_was_sent_behind_a_refused_step_is_not_applied_before_the_caller_knows() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.open("a", "b")
    for value in (1.0, BAD, 5.0):
        gateway.send(a=value, b=2.0)
    found = gateway.receive_all()
    assert sorted(all_rows(found)) == [("a", 0, 1.0), ("b", 0, 2.0), ("b", 1, 4.0), ("b", 2, 6.0)]
    assert [name for answer in found for name in answer.errors] == ["a"]
    assert rows(gateway.step(a=4.0)) == [("a", 1, 5.0)]


def test_steps_that_the_caller_sends_after_a_refusal_wait_until_those_behind_it_are_refused() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.open("a")
    gateway.send(a=BAD)
    gateway.send(a=1.0)
    gateway.send(a=1.0)
    one_by_one = iter(["request"] * 3 + ["all work", "response"])
    gateway.choose = lambda possible: next(one_by_one, None) or calmly(possible)
    told = gateway.receive()
    assert told is not None
    assert list(told.errors) == ["a"]
    gateway.send(a=7.0)
    assert not gateway.requests
    assert all_rows(gateway.receive_all()) == [("a", 0, 7.0)]


def test_a_refusal_of_a_whole_message_may_overtake_answers_and_later_refusals_still_count() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.open("a")
    for _ in range(3):
        gateway.send(a=1.0)
    server.take(gateway.requests.popleft())
    server.take(gateway.requests.popleft())
    gateway.requests.clear()
    (number,) = server.handles
    gateway.say(server._refusal(number, 2, "SHAPE_MISMATCH"))
    found = gateway.receive_all()
    assert all_rows(found) == [("a", 0, 1.0), ("a", 1, 2.0)]
    assert [type(error) for answer in found for error in answer.errors.values()] == [ShapeMismatch]
    assert list(gateway.step(a=BAD).errors) == ["a"]
    assert rows(gateway.step(a=1.0)) == [("a", 2, 3.0)]


def test_a_session_has_at_most_as_many_outstanding_as_the_server_allows() -> None:
    gateway = Gateway(Server())
    for _ in range(20):
        gateway.send(a=1.0, b=1.0)  # the server asserts it
    assert len(all_rows(gateway.receive_all())) == 40


def test_a_slow_session_holds_up_no_answer_of_another() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.open("slow", "quick")
    gateway.send(slow=1.0, quick=2.0)
    gateway.say(*server.take(gateway.requests.popleft()))
    gateway.say(*server.work([2]))
    assert rows(gateway.receive()) == [("quick", 0, 2.0)]


def test_a_batch_is_split_where_the_server_takes_fewer_rows() -> None:
    server = Server()
    server.max_steps = 2
    gateway = Gateway(server)
    gateway.open(*"abcde")
    assert len(rows(gateway.step(a=1.0, b=1.0, c=1.0, d=1.0, e=1.0))) == 5
    assert [len(batch.handles) for batch in server.batches] == [2, 2, 1]


def test_sessions_of_different_versions_of_the_model_go_in_messages_of_their_own() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.open("a", "c")
    server.version = 2
    gateway.open("b")
    assert len(rows(gateway.step(a=1.0, b=1.0, c=1.0))) == 3
    assert [list(batch.handles) for batch in server.batches] == [[1, 2], [3]]


def test_a_request_tells_the_server_only_of_answers_that_the_caller_has() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.open("a", "b")
    gateway.send(a=1.0, b=1.0)
    gateway.step(a=1.0)
    gateway.step(a=1.0)
    assert [list(batch.answered_steps) for batch in server.batches] == [[0, 0], [0], [0]]
    assert gateway.sessions.resume_point("a").answered_step == 0
    assert len(all_rows(gateway.receive_all())) == 2
    gateway.step(a=1.0, b=1.0)
    assert list(server.batches[-1].answered_steps) == [3, 1]


@pytest.mark.parametrize("crash", [True, False])
def test_after_a_cut_all_sessions_go_on_without_a_hole_or_a_repetition(crash: bool) -> None:
    server = Server()
    told: list[Notice] = []
    gateway = Gateway(server, on_notice=told.append)
    gateway.step(a=1.0, b=10.0)
    gateway.say(*server.checkpoint())
    gateway.step(b=10.0)
    if crash:
        server.crash()
    gateway.lose()
    assert rows(gateway.step(a=1.0, b=10.0)) == [("a", 1, 2.0), ("b", 2, 30.0)]
    assert server.applied.count(("b", 1)) == (2 if crash else 1)
    assert [(notice.reason, notice.session) for notice in told] == [("interrupted", None), ("resumed", None)]


def test_answers_that_were_lost_on_the_way_come_with_the_next_call() -> None:
    server = Server("process")
    gateway = Gateway(server)
    gateway.open("a")
    for _ in range(3):
        gateway.send(a=1.0)
    for _ in range(3):
        server.take(gateway.requests.popleft())
        server.work(server.busy)
    gateway.lose()
    assert all_rows(gateway.receive_all()) == [("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0)]
    assert server.applied == [("a", 0), ("a", 1), ("a", 2)]


def test_more_than_may_be_outstanding_is_sent_again_bit_by_bit() -> None:
    server = Server()
    gateway = Gateway(server)
    for _ in range(50):
        gateway.step(a=1.0, b=1.0)
    server.crash()
    gateway.lose()
    assert rows(gateway.step(a=1.0, b=1.0)) == [("a", 50, 51.0), ("b", 50, 51.0)]


def test_a_resend_after_a_crash_uses_messages_of_many_sessions() -> None:
    server = Server()
    gateway = Gateway(server)
    names = [f"s{i}" for i in range(40)]
    for _ in range(3):
        gateway.step(**dict.fromkeys(names, 1.0))
    server.crash()
    server.batches.clear()
    gateway.lose()
    gateway.step(**dict.fromkeys(names, 1.0))
    assert [len(batch.handles) for batch in server.batches] == [40] * 4


def test_an_evicted_session_is_opened_again_and_the_others_notice_nothing() -> None:
    server = Server("process")
    told: list[Notice] = []
    gateway = Gateway(server, on_notice=told.append)
    gateway.step(a=1.0, b=1.0)
    gateway.say(*server.end("a", status("EVICTED", resumable="true")))
    assert rows(gateway.step(a=1.0, b=1.0)) == [("a", 1, 2.0), ("b", 1, 2.0)]
    assert [opening.session_id for opening in server.opens] == ["a", "b", "a"]
    reasons = [(notice.reason, notice.session, notice.step) for notice in told]
    assert reasons == [("interrupted", "a", None), ("resumed", "a", 1)]


@pytest.mark.parametrize(
    ("why", "kind"),
    [
        (status("EVICTED", resumable="false"), Evicted),
        (status("SESSION_NOT_FOUND"), SessionNotFound),
        (status("MODEL_NOT_FOUND"), RnnserveError),
    ],
)
def test_a_session_that_is_over_says_so_in_each_answer_until_its_name_is_opened_again(
    why: Status, kind: type[RnnserveError]
) -> None:
    server = Server("process")
    gateway = Gateway(server)
    gateway.step(a=1.0, b=1.0)
    gateway.say(*server.end("a", why))
    del server.states["a"]
    for step in (1, 2):
        answer = gateway.step(a=1.0, b=1.0)
        assert rows(answer) == [("b", step, step + 1.0)]
        assert isinstance(answer.errors["a"], kind)
    assert gateway.sessions.names == ["b"]
    gateway.sessions.forget(gateway.sessions.known(["a", "b"]))
    assert rows(gateway.step(a=1.0, b=1.0)) == [("a", 0, 1.0), ("b", 3, 4.0)]


def test_a_session_that_was_moved_asks_once_whether_another_caller_has_it() -> None:
    server = Server("process")
    gateway = Gateway(server)
    gateway.step(a=1.0)
    gateway.say(*server.end("a", status("SESSION_MOVED")))
    assert rows(gateway.step(a=1.0)) == [("a", 1, 2.0)]
    assert not server.opens[-1].take_over
    gateway.say(*server.end("a", status("SESSION_MOVED")))
    server.refuses["a"] = status("SESSION_MOVED")
    assert isinstance(gateway.step(a=1.0).errors["a"], SessionMoved)


def test_an_open_is_refused_alone_and_tried_again_with_the_next_step() -> None:
    server = Server()
    gateway = Gateway(server)
    server.refuses["b"] = status("SESSION_EXISTS")
    with pytest.raises(SessionExists):
        gateway.open("a", "b", "c")
    assert gateway.sessions.names == ["a", "c"]
    assert list(gateway.step(a=1.0, b=1.0).errors) == ["b"]
    server.refuses.clear()
    assert rows(gateway.step(a=1.0, b=1.0)) == [("a", 1, 2.0), ("b", 0, 1.0)]


def test_a_reopening_that_is_put_off_is_tried_until_the_time_for_it_is_over() -> None:
    server = Server("process")
    gateway = Gateway(server, resume_timeout_s=10.0)
    gateway.step(a=1.0)
    server.refuses["a"] = status("SESSION_LIMIT", retry_after_s=1.0)
    gateway.say(*server.end("a", status("EVICTED", resumable="true")))
    began_s = Clock.now_s
    error = gateway.step(a=1.0).errors["a"]
    assert error.reason == "SESSION_LIMIT"
    assert 9.9 <= Clock.now_s - began_s <= 10.1


def test_after_a_crash_a_session_that_cannot_be_opened_for_now_is_tried_again_and_the_others_go_on() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0, b=1.0)
    gateway.say(*server.checkpoint())
    gateway.step(a=1.0, b=1.0)
    server.crash()
    server.refuses["a"] = status("STORE_UNAVAILABLE", retry_after_s=0.2)
    gateway.lose()
    assert rows(gateway.step(b=1.0)) == [("b", 2, 3.0)]
    server.refuses.clear()
    assert rows(gateway.step(a=1.0, b=1.0)) == [("a", 2, 3.0), ("b", 3, 4.0)]


def test_a_session_whose_opening_takes_long_holds_up_no_other() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0, b=1.0)
    gateway.lose()
    late: list[pb.MultiplexStepsRequest] = []

    def take(request: pb.MultiplexStepsRequest) -> list[pb.MultiplexStepsResponse]:
        if request.open.open.session_id != "a":
            return Server.take(server, request)
        late.append(request)
        return []

    server.take = take  # type: ignore[method-assign]
    assert rows(gateway.step(b=1.0)) == [("b", 1, 2.0)]
    assert len(late) == 1


def test_a_session_that_the_server_does_not_keep_is_over_with_the_call_and_the_call_goes_on() -> None:
    server = Server("none")
    gateway = Gateway(server)
    gateway.step(a=1.0)
    server.states.clear()
    gateway.lose()
    assert isinstance(gateway.step(a=1.0).errors["a"], Unreachable)
    assert rows(gateway.step(b=1.0)) == [("b", 0, 1.0)]


def test_the_resume_of_a_call_ends_with_its_time() -> None:
    gateway = Gateway(Server(), resume_timeout_s=0.0)
    gateway.step(a=1.0)
    gateway.lose(Draining("going"))
    for _ in range(2):
        with pytest.raises(Draining):
            gateway.step(a=1.0)


def test_the_first_call_is_tried_again_where_no_server_answers() -> None:
    gateway = Gateway(Server(), open_attempts=3)
    gateway.sessions.numbers(["a"])
    gateway.sessions.begin()
    assert [len(gateway.sessions.cut(Unreachable("gone")).requests) for _ in range(3)] == [1, 1, 0]
    assert isinstance(gateway.sessions.failure, Unreachable)


def test_a_session_goes_on_from_the_resume_point_of_another_call_and_gets_what_that_missed() -> None:
    server = Server("process")
    gateway = Gateway(server)
    gateway.step(a=1.0)
    point = gateway.sessions.resume_point("a")
    gateway.step(a=2.0)
    other = Gateway(server)
    other.sessions.resume(ResumePoint(*point))
    other.open("a")
    assert [server.opens[-1].resume, server.opens[-1].take_over] == [True, True]
    assert rows(other.receive()) == [("a", 1, 3.0)]
    assert rows(other.step(a=4.0)) == [("a", 2, 7.0)]
    other.lose()
    other.step(a=1.0)
    assert [server.opens[-1].resume, server.opens[-1].take_over] == [True, False]


def test_a_resume_point_behind_a_reset_does_it_again() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=5.0)
    server.checkpoint()
    gateway.reset("a")
    point = gateway.sessions.resume_point("a")
    server.crash()
    other = Gateway(server)
    other.sessions.resume(point)
    assert rows(other.step(a=1.0)) == [("a", 1, 1.0)]
    assert not other.sessions.resume_point("a").reset


def test_who_has_answers_to_steps_that_the_server_lost_learns_where_to_go_on() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0)
    server.checkpoint()
    gateway.step(a=1.0)
    point = gateway.sessions.resume_point("a")
    server.crash()
    other = Gateway(server)
    other.sessions.resume(point)
    with pytest.raises(ResumePointLost) as caught:
        other.open("a")
    assert caught.value.metadata == {"expected_step": "1"}


def test_resets_are_done_again_after_a_crash_but_not_those_before_what_is_durable() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0, b=1.0)
    gateway.reset("a")
    gateway.reset("a")
    server.crash()
    gateway.lose()
    assert rows(gateway.step(a=2.0, b=2.0)) == [("a", 1, 2.0), ("b", 1, 3.0)]
    gateway.say(*server.checkpoint())
    server.crash()
    gateway.lose()
    assert rows(gateway.step(a=2.0, b=2.0)) == [("a", 2, 4.0), ("b", 2, 5.0)]


def test_a_reset_that_was_refused_with_the_steps_before_it_can_be_done_and_lasts() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0)
    gateway.send(a=BAD)
    with pytest.raises(NotFinite):
        gateway.reset("a")  # before step 2
    gateway.step(a=1.0)
    gateway.reset("a")
    server.crash()
    gateway.lose()
    assert rows(gateway.step(a=2.0)) == [("a", 2, 2.0)]


def test_a_reset_before_a_refused_step_is_done_and_lasts() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0)
    gateway.reset("a")
    gateway.step(a=BAD)
    server.crash()
    gateway.lose()
    assert rows(gateway.step(a=2.0)) == [("a", 1, 2.0)]


def test_a_reset_lasts_where_an_older_step_of_another_session_is_refused_together_with_the_one_behind_it() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0, b=1.0)
    a, b = server.handles

    def slow_b(possible: list[str]) -> str:
        if "response" in possible or "request" in possible:
            return calmly(possible)
        gateway.say(*server.work([a]))
        return "response"

    gateway.send(b=BAD)
    gateway.choose = slow_b
    gateway.reset("a")
    gateway.send(a=BAD)
    server.take(gateway.requests.popleft())
    together, other = server.work([a, b])
    together.refused.MergeFrom(other.refused)
    gateway.say(together)
    gateway.choose = calmly
    gateway.receive()
    server.crash()
    gateway.lose()
    assert rows(gateway.step(a=2.0, b=2.0)) == [("a", 1, 2.0), ("b", 1, 3.0)]


def test_resets_without_a_step_between_them_are_kept_as_one() -> None:
    gateway = Gateway(Server(), replay_buffer_bytes=100)
    gateway.step(a=1.0)
    for _ in range(20):
        gateway.reset("a")
    assert not gateway.sessions.full


def test_a_closed_session_is_gone_and_its_name_begins_anew() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0, b=1.0)
    gateway.send(a=1.0)
    gateway.close("a", "unknown")
    assert list(server.states) == ["b"]
    with pytest.raises(SessionNotFound):
        gateway.sessions.resume_point("a")
    assert rows(gateway.receive()) == [("a", 1, 2.0)]
    assert rows(gateway.step(a=1.0, b=1.0)) == [("a", 0, 1.0), ("b", 1, 2.0)]


def test_a_close_that_was_cut_is_sent_again_and_one_that_was_done_finds_no_session() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.step(a=1.0, b=1.0)
    lost = iter(["request", "cut"])
    gateway.choose = lambda possible: next(lost, None) or calmly(possible)
    gateway.close("a")
    lost = iter(["request", "all work", "cut"])
    gateway.close("b")
    assert server.opens[-1].resume
    assert not server.states
    assert gateway.sessions.names == []
    assert gateway.receive() is None


@pytest.mark.parametrize("erases", [True, False])
def test_a_notice_tells_that_the_server_may_still_have_a_session(erases: bool) -> None:
    server = Server()
    server.erases = erases
    gateway = Gateway(server)
    gateway.step(a=1.0)
    gateway.close("a")
    gateway.sessions.closed()
    told = [(notice.reason, notice.session) for notice in gateway.sessions.notices]
    assert told == ([] if erases else [("not_erased", "a")])


def test_what_is_durable_is_no_longer_kept_and_what_is_not_holds_up_the_next_step() -> None:
    server = Server()
    gateway = Gateway(server, replay_buffer_bytes=10)
    gateway.step(a=1.0, b=1.0)
    assert gateway.sessions.full
    gateway.step(a=1.0)  # behind the checkpoint that comes now
    assert server.stored["a"].next_step == 1
    assert gateway.sessions.table.durable_step[gateway.sessions.number("b")] == 1


def test_without_a_checkpoint_a_full_replay_buffer_says_so_and_the_call_stays_usable() -> None:
    server = Server()
    gateway = Gateway(server, replay_buffer_bytes=10)
    gateway.step(a=1.0)
    gateway.choose = lambda possible: gateway.lose(TimedOut("late")) or "response"  # type: ignore[func-returns-value]
    with pytest.raises(TimedOut, match="replay buffer"):
        gateway.step(a=1.0)
    gateway.choose = calmly
    assert rows(gateway.step(a=2.0)) == [("a", 1, 3.0)]


def test_a_full_replay_buffer_may_drop_instead_and_then_a_crash_loses_the_sessions_it_dropped() -> None:
    server = Server()
    gateway = Gateway(server, replay_buffer_bytes=60, when_replay_full="drop")
    gateway.step(a=1.0)
    server.checkpoint()
    for _ in range(4):
        gateway.step(a=1.0)
    gateway.step(b=1.0)
    server.crash()
    gateway.lose()
    answer = gateway.step(a=1.0, b=1.0)
    assert isinstance(answer.errors["a"], ResumePointLost)
    assert rows(answer) == [("b", 1, 2.0)]


def test_one_session_that_never_becomes_durable_does_not_keep_what_the_others_sent() -> None:
    server = Server()
    gateway = Gateway(server, replay_buffer_bytes=500)
    gateway.step(idle=1.0)
    for _ in range(100):
        gateway.step(busy=1.0)
        busy = gateway.sessions.number("busy")
        handle = int(gateway.sessions.table.handle[busy])
        durable = pb.HandlesDurable(handles=[handle], durable_steps=[server.states["busy"].next_step])
        gateway.say(pb.MultiplexStepsResponse(durable=durable))
    assert server.stored == {}


def test_numbers_are_used_again_so_that_sessions_may_come_and_go() -> None:
    gateway = Gateway(Server())
    for i in range(500):
        gateway.step(**{"stays": 1.0, f"s{i}": float(i)})
        gateway.close(f"s{i}")
    assert gateway.sessions.table.capacity <= 128
    assert rows(gateway.step(stays=1.0, other=3.0)) == [("stays", 500, 501.0), ("other", 0, 3.0)]


def test_answers_of_closed_sessions_that_are_not_taken_keep_their_names() -> None:
    gateway = Gateway(Server())
    for i in range(300):
        gateway.send(**{f"s{i}": float(i)})
        gateway.close(f"s{i}")
    assert all_rows(gateway.receive_all()) == [(f"s{i}", 0, float(i)) for i in range(300)]


def test_an_answer_that_was_left_out_ends_the_session_that_it_is_about() -> None:
    server = Server()
    gateway = Gateway(server)
    gateway.open("a", "b")
    gateway.send(a=1.0, b=1.0)
    gateway.send(a=1.0, b=1.0)
    for request in gateway.requests:
        server.take(request)
    gateway.requests.clear()
    server.work([1])
    gateway.say(*server.work([1, 2]), *server.work([2]))
    found = gateway.receive_all()
    assert all_rows(found) == [("b", 0, 1.0), ("b", 1, 2.0)]
    assert [type(error) for answer in found for error in answer.errors.values()] == [ResumePointLost]


def test_a_message_that_the_server_cannot_read_ends_the_call() -> None:
    gateway = Gateway(Server())
    gateway.open("a")
    gateway.send(a=1.0)
    gateway.say(pb.MultiplexStepsResponse(refused=pb.HandlesRefused(error=status("MESSAGE_MALFORMED"))))
    with pytest.raises(RnnserveError, match="MALFORMED"):
        gateway.receive()


def test_texts_have_a_step_for_each_session_and_messages_are_not_too_large() -> None:
    sessions = Multiplexed("text", 0, prediction_pb2.OutputOptions())
    numbers = sessions.numbers(["a", "b"])
    sessions.begin()
    for handle in (1, 2):
        opened = pb.SessionOpened(max_steps_per_message=9, max_message_bytes=1000)
        sessions.handle(
            pb.MultiplexStepsResponse(opened=pb.HandleOpened(handle=handle, opened=opened, max_outstanding_steps=9))
        )
    sessions.steps(numbers, rows_array("ö\0", 2))
    *_, request = sessions.begin().requests
    assert list(request.steps.text.steps) == ["ö", "\0"]
    sessions.steps(numbers, rows_array(["word", "w" * 200], 2))
    first, second = sessions.begin().requests
    assert [list(request.steps.text.steps) for request in (first, second)] == [["word"], ["w" * 200]]


def test_a_kept_text_counts_as_large_as_it_is_and_nothing_once_it_is_dropped() -> None:
    table = SessionTable()
    table.grow(2)
    replay = BatchReplay(table, 1_000)
    batch = Batch("steps", np.arange(2), np.zeros(2, np.int64), rows_array(["a" * 300, "b"], 2))
    replay.add(batch)
    assert replay.full
    table.released_step[0] = 1
    replay.sweep()
    assert not replay.full
    table.released_step[1] = 1
    replay.sweep()
    assert list(replay) == []
    replay.add(batch.rows(slice(1, 2)))
    assert not replay.full


@pytest.mark.parametrize("x", [[1.0, 2.0], [[1.0]], "abc", ["a"], [[[1.0]], [[2.0]]]])
def test_a_step_of_each_session_has_a_row_for_each(x: Any) -> None:
    with pytest.raises(ShapeMismatch):
        rows_array(x, 2)


def test_a_value_that_does_not_fit_costs_its_own_row_only() -> None:
    assert rows_array([[1e300], [1.0]], 2).tolist() == [[np.inf], [1.0]]


def test_the_inputs_are_a_copy_which_the_caller_may_change() -> None:
    x = np.zeros((2, 1), np.float32)
    kept = rows_array(x, 2)
    x[:] = 1.0
    assert kept.tolist() == [[0.0], [0.0]]


def test_names_are_checked_before_anything_is_sent() -> None:
    sessions = Multiplexed("sum", 0, prediction_pb2.OutputOptions())
    with pytest.raises(FieldInvalid):
        sessions.numbers(["fine", "not fine"])
    with pytest.raises(ValueError, match="twice"):
        sessions.numbers(["a", "a"])
    with pytest.raises(TypeError):
        sessions.numbers("abc")
    assert sessions.names == []


def test_each_session_has_a_random_token_of_its_own_and_all_one_caller_id() -> None:
    server = Server()
    Gateway(server).open("a", "b")
    first, second = server.opens
    assert len(first.resume_token) == len(second.resume_token) == 16
    assert first.resume_token != second.resume_token
    assert first.caller_id == second.caller_id


def test_a_status_says_when_to_come_back() -> None:
    assert error_from_status(status("DRAINING", retry_after_s=1.5)).retry_after_s == 1.5
