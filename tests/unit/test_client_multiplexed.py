"""The bookkeeping of a multiplexed stream against a server of a few lines: sums, whatever is cut, lost or refused."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.any_pb2 import Any
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from rnnserve import Unreachable
from rnnserve.batches import Arrived
from rnnserve.multiplexed import Multiplexed, MultiplexTurn, Request
from rnnserve.tensors import array_from, batch_rows, tensor_from
from rnnserve.v1 import real_time_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import OutputOptions, Prediction

NAN = math.nan
MAX_OUTSTANDING = 3


def refusal(reason: str) -> Status:
    info = Any()
    info.Pack(ErrorInfo(reason=reason, domain="rnnserve"))
    return Status(code=3, message=reason, details=[info])


@dataclass
class Kept:
    """A session as the server has it: what each step summed up to, and the sum now."""

    token: bytes
    totals: list[float] = field(default_factory=list)
    total: float = 0.0
    answered_step: int = 0

    def copy(self) -> "Kept":
        return Kept(self.token, list(self.totals), self.total, self.answered_step)


class SmallServer:
    """Sums of the steps of each session; `durable` is what a crash leaves."""

    def __init__(self) -> None:
        self.sessions: dict[str, Kept] = {}
        self.durable: dict[str, Kept] = {}
        self.new_call()

    def new_call(self) -> None:
        self.handles: dict[int, str] = {}
        self.requests: deque[Request] = deque()
        self.responses: deque[pb.MultiplexStepsResponse] = deque()

    def crash(self) -> None:
        self.sessions = {name: kept.copy() for name, kept in self.durable.items()}

    def checkpoint(self) -> None:
        self.durable = {name: kept.copy() for name, kept in self.sessions.items()}
        told = pb.HandlesDurable(
            handles=self.handles, durable_steps=[len(self.durable[name].totals) for name in self.handles.values()]
        )
        self.responses.append(pb.MultiplexStepsResponse(durable=told))

    def take(self) -> None:
        """One request; each of its steps is answered by a message of its own."""
        request = self.requests.popleft()
        if request.HasField("open"):
            self._open(request.open)
        elif request.HasField("reset"):
            kept = self._kept(request.reset.handle, request.reset.answered_step)
            if request.reset.reset.first_step != len(kept.totals):
                self._refuse(request.reset.handle, request.reset.reset.first_step, "STEP_OUT_OF_ORDER")
                return
            kept.total = 0.0
            reset = pb.HandleReset(handle=request.reset.handle, next_step=len(kept.totals))
            self.responses.append(pb.MultiplexStepsResponse(reset=reset))
        else:
            batch = request.steps
            values = array_from(batch.tensor)[:, 0].tolist()
            for row in zip(batch.handles, batch.first_steps, batch.answered_steps, values, strict=True):
                self._step(*row)

    def _kept(self, handle: int, answered_step: int) -> Kept:
        kept = self.sessions[self.handles[handle]]
        kept.answered_step = max(kept.answered_step, answered_step)
        return kept

    def _open(self, wanted: pb.OpenHandle) -> None:
        name = wanted.open.session_id
        kept = self.sessions.get(name)
        if kept is None and wanted.open.resume:
            ended = pb.HandlesEnded(handles=[wanted.handle], error=refusal("SESSION_NOT_FOUND"))
            self.responses.append(pb.MultiplexStepsResponse(ended=ended))
            return
        kept = self.sessions.setdefault(name, Kept(wanted.open.resume_token))
        assert kept.token == wanted.open.resume_token
        assert kept.answered_step <= wanted.answered_step or not kept.totals
        self.handles[wanted.handle] = name
        opened = pb.HandleOpened(
            handle=wanted.handle,
            opened=pb.SessionOpened(
                next_step=len(kept.totals), durability=pb.DURABILITY_STORED, max_steps_per_message=2,
                max_message_bytes=1_000,
            ),
            durable_step=len(self.durable[name].totals) if name in self.durable else 0,
            max_outstanding_steps=MAX_OUTSTANDING,
        )  # fmt: skip
        for step in range(wanted.answered_step, len(kept.totals)):
            missed = pb.StepsAnswer(first_step=step, next_step=step + 1, prediction=prediction([kept.totals[step]]))
            opened.missed.append(missed)
        self.responses.append(pb.MultiplexStepsResponse(opened=opened))

    def _step(self, handle: int, step: int, answered_step: int, value: float) -> None:
        kept = self._kept(handle, answered_step)
        if math.isnan(value):
            self._refuse(handle, step, "NOT_FINITE")
        elif step > len(kept.totals):
            self._refuse(handle, step, "STEP_OUT_OF_ORDER")
        else:
            if step == len(kept.totals):
                kept.total += value
                kept.totals.append(kept.total)
            answer = pb.StepBatchAnswer(
                handles=[handle], first_steps=[step], durable_steps=[0], prediction=prediction([kept.totals[step]])
            )
            self.responses.append(pb.MultiplexStepsResponse(answer=answer))

    def _refuse(self, handle: int, step: int, reason: str) -> None:
        refused = pb.HandlesRefused(handles=[handle], first_steps=[step], next_steps=[0], error=refusal(reason))
        self.responses.append(pb.MultiplexStepsResponse(refused=refused))


def prediction(totals: Sequence[float]) -> Prediction:
    return Prediction(outputs=tensor_from(batch_rows([[total] for total in totals])))


class SumsAcrossCuts(RuleBasedStateMachine):
    """What each session hears is what it was told, in order, once, whatever happens on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.server = SmallServer()
        self.client = Multiplexed("sums", 0, OutputOptions(), open_attempts=1_000)
        self.told: dict[int, list[float | None]] = {}  # values, and None for a reset
        self.heard: dict[int, list[float]] = {}
        self.arrived: deque[Arrived] = deque()  # which the caller has not taken yet

    @initialize(sessions=st.integers(1, 2))
    def begin(self, sessions: int) -> None:
        self.add(sessions)
        self.talk(2, 2)

    @rule(sessions=st.integers(1, 2))
    def add(self, sessions: int) -> None:
        if len(self.told) < 3:
            numbers = [self.client.add(None) for _ in range(sessions)]
            self.told |= {number: [] for number in numbers}
            self.heard |= {number: [] for number in numbers}
            self.do(MultiplexTurn(self.client.opens(numbers)))

    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        if not self.told:
            return
        numbers = data.draw(st.lists(st.sampled_from(sorted(self.told)), unique=True, min_size=1))
        values = [float(data.draw(st.integers(0, 99))) for _ in numbers]
        for number, value in zip(numbers, values, strict=True):
            self.told[number].append(value)
        self.do(MultiplexTurn(self.client.steps(np.array(numbers), batch_rows([[value] for value in values]))))

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        if self.told:
            number = data.draw(st.sampled_from(sorted(self.told)))
            self.told[number].append(None)
            self.do(MultiplexTurn(self.client.resets(np.array([number]))))

    @rule(data=st.data())
    def send_what_is_refused(self, data: st.DataObject) -> None:
        if self.told:
            number = data.draw(st.sampled_from(sorted(self.told)))
            self.told[number].append(NAN)
            self.do(MultiplexTurn(self.client.steps(np.array([number]), batch_rows([[NAN]]))))

    @rule(requests=st.integers(1, 5), responses=st.integers(1, 5))
    def talk(self, requests: int, responses: int) -> None:
        self.server_takes(requests)
        self.client_reads(responses)

    @rule(requests=st.integers(1, 5))
    def server_takes(self, requests: int) -> None:
        for _ in range(min(requests, len(self.server.requests))):
            self.server.take()

    @rule(responses=st.integers(1, 3))
    def client_reads(self, responses: int) -> None:
        for _ in range(min(responses, len(self.server.responses))):
            self.do(self.client.handle(self.server.responses.popleft()))

    @rule()
    def checkpoint(self) -> None:
        self.server.checkpoint()

    @precondition(lambda self: len(self.server.handles) == len(self.told))
    @rule(crashes=st.booleans())
    def cut(self, crashes: bool) -> None:
        if crashes:
            self.server.crash()
        self.server.new_call()
        self.do(self.client.cut(Unreachable("cut")))

    def do(self, turn: MultiplexTurn) -> None:
        assert self.client.failure is None
        self.server.requests.extend(turn.requests)
        for arrived in turn.results:
            self.hear(arrived)

    def hear(self, arrived: Arrived) -> None:
        for number in arrived.errors:
            self.told[number] = before_step(self.told[number], int(self.client.columns.next_step[number]))
        if arrived.prediction is None:
            return
        self.arrived.append(arrived)
        totals = arrived.needed_prediction.outputs[:, 0].tolist()
        for number, step, total in zip(arrived.numbers.tolist(), arrived.steps.tolist(), totals, strict=True):
            assert step == len(self.heard[number])
            self.heard[number].append(total)

    @rule()
    def hand_over(self) -> None:
        while self.arrived:
            self.client.hand_over(self.arrived.popleft())

    def teardown(self) -> None:
        while self.server.requests or self.server.responses:
            self.server_takes(5)
            self.client_reads(8)
        for number, told in self.told.items():
            assert self.heard[number] == expected(told), (number, told)
        assert self.client.idle


def before_step(told: list[float | None], step: int) -> list[float | None]:
    """All before the step of that index, which was refused, and what came behind it too."""
    steps = [place for place, value in enumerate(told) if value is not None]
    return told[: steps[step]] if step < len(steps) else told


def expected(told: Sequence[float | None]) -> list[float]:
    total, totals = 0.0, []
    for value in told:
        total = 0.0 if value is None else total + value
        if value is not None:
            totals.append(total)
    return totals


def test_steps_made_anew_before_all_refusals_have_come_are_not_taken_for_the_refused_ones() -> None:
    machine = SumsAcrossCuts()
    machine.begin(sessions=1)

    def send(*values: float) -> None:
        for value in values:
            machine.do(MultiplexTurn(machine.client.steps(np.array([0]), batch_rows([[value]]))))

    send(NAN, 1.0, 2.0)
    machine.server_takes(3)
    machine.client_reads(1)
    machine.told[0] = [5.0, 6.0]
    send(5.0, 6.0)
    machine.teardown()
    assert machine.client.columns.next_step[0] == 2


TestSumsAcrossCuts = SumsAcrossCuts.TestCase
TestSumsAcrossCuts.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
