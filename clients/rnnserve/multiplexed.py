"""The bookkeeping of many sessions on one stream, without I/O: a number for each, and arrays by that number.

Each is as a session on a stream of its own (`session.py`); but what is done for each step is done in one go for all
sessions that a message is about.
"""

import secrets
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rnnserve.announcer import Announcer
from rnnserve.batches import Arrived, BatchAnswer, Integers, Kept, Sent, integers, steps_request
from rnnserve.errors import (
    Evicted,
    ResumePointLost,
    RnnserveError,
    SessionNotFound,
    StreamClosed,
    TimedOut,
    TryAgain,
    Unreachable,
)
from rnnserve.exchange import Turn
from rnnserve.replay import REPLAY_BUFFER_BYTES, WhenReplayFull
from rnnserve.requests import checked_version
from rnnserve.results import Notice, ResumePoint, notice_from
from rnnserve.retry import Resumption
from rnnserve.session import RESUME_TIMEOUT_S, Durability, checked_session_id, durability_from, token_bytes
from rnnserve.statuses import error_from_status
from rnnserve.v1 import real_time_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import OutputOptions

Request = pb.MultiplexStepsRequest
MultiplexTurn = Turn[Request, Arrived]

NO_HANDLE = -1


@dataclass
class Named:
    """What is the same for a session over all its steps."""

    id: str
    token: bytes
    taken_over: bool = False  # from another stream, by a resume point
    was_open: bool = False
    durability: Durability = "none"
    failure: RnnserveError | None = None  # it has ended
    leaving: bool = False


class Columns:
    """A number of each kind for each session: all indices of steps, unless said otherwise."""

    def __init__(self) -> None:
        self.next_step = _zeros()
        self.sent_step = _zeros()  # no step from here on was ever sent
        self.answered_step = _zeros()  # each answer before it has come
        self.handed_step = _zeros()  # each answer before it is with the caller; what the server is told
        self.durable_step = _zeros()
        self.kept_step = _zeros()  # each step from here on is kept to be sent again
        self.reset_step = _zeros()  # the last reset that was answered came before this one
        self.owed = _zeros()  # how many answers this call owes
        self.stale = _zeros()  # how many of them are refusals that follow from the first one
        self.handle = _zeros()  # on this call; -1 = the session is not open there
        self.gone = _zeros()  # 1 = it has ended, and nothing of it need be kept
        self.stored = _zeros()  # 1 = it survives a crash of the server

    def make_room(self, sessions: int) -> None:
        """For so many sessions in all."""
        for name, column in vars(self).items():
            if len(column) < sessions:
                grown = np.zeros(max(sessions, 2 * len(column)), np.int64)
                grown[: len(column)] = column
                setattr(self, name, grown)


class Multiplexed:
    """Makes the requests of all sessions of a model on one stream, and reads the responses, in whatever order.

    After `cut` all sessions go on where they were, if the server keeps them: they are opened again, and what the
    server does not have is sent again. What the caller has already got is dropped.
    """

    def __init__(
        self,
        model: str,
        version: int,
        options: OutputOptions,
        *,
        durable: bool = False,
        replay_buffer_bytes: int = REPLAY_BUFFER_BYTES,
        when_replay_full: WhenReplayFull = "wait",
        resume_timeout_s: float = RESUME_TIMEOUT_S,
        open_attempts: int = 1,
        other_connections: bool = False,
        on_notice: Callable[[Notice], object] | None = None,
    ) -> None:
        self.failure: RnnserveError | None = None
        self.announcer = Announcer(on_notice)
        self._opening = pb.OpenSession(
            model=model, version=checked_version(version), options=options, require_durable=durable,
            caller_id=secrets.token_bytes(16),
        )  # fmt: skip
        self._kept = Kept(replay_buffer_bytes, when_replay_full)
        self._resumption = Resumption(resume_timeout_s)
        self._attempts = open_attempts  # left until a session is open for the first time
        self._other_connections = other_connections
        self._named: list[Named] = []
        self._numbers: dict[str, int] = {}  # of those that have not ended
        self.columns = Columns()
        self._number_of = np.zeros(0, np.int64)  # by handle of this call
        self._handles = 0  # how many this call has had
        self._waiting_to_open: set[int] = set()
        self._to_resume: dict[int, int] = {}  # handles of those that are open, but what they lack is not sent yet
        self._unsent: deque[Sent] = deque()
        self._to_close: set[int] = set()
        self._closing: set[int] = set()
        self._cut = False
        self._limits = pb.HandleOpened(max_outstanding_steps=1)

    # What the facades ask.

    @property
    def owes(self) -> bool:
        """Whether the server owes anything."""
        return bool(self._waiting_to_open or self.columns.owed.any())

    @property
    def full(self) -> bool:
        """Whether no more steps should be made, for they could not be kept."""
        return self._kept.full

    @property
    def names(self) -> list[str]:
        """Of the sessions that have not ended."""
        return [name for name, number in self._numbers.items() if not self.columns.gone[number]]

    @property
    def idle(self) -> bool:
        """Whether nothing more will come unasked."""
        return not (self.owes or self._unsent or self._to_resume)

    def number(self, name: str) -> int | None:
        """Of the session that has the name, or had it last and has failed."""
        return self._numbers.get(name)

    def is_open(self, name: str) -> bool:
        """Whether there is such a session, and it has not ended."""
        number = self._numbers.get(name)
        return number is not None and not self.columns.gone[number]

    def are_reset(self, numbers: Integers, steps: Integers) -> bool:
        """Whether a reset of each before that step is answered, in whatever way."""
        c = self.columns
        answered = (c.reset_step[numbers] >= steps) | (c.gone[numbers] > 0) | (c.next_step[numbers] < steps)
        return bool(answered.all())

    def answer(self, arrived: Arrived) -> BatchAnswer:
        """For the caller."""
        names = tuple(self._named[number].id for number in arrived.numbers.tolist())
        errors = {self._named[number].id: error for number, error in arrived.errors.items()}
        return BatchAnswer.of(names, arrived.steps, arrived.prediction, errors)

    def failure_of(self, number: int) -> RnnserveError | None:
        """Why it has ended."""
        return self._named[number].failure

    def are_opening(self, numbers: Sequence[int]) -> bool:
        """Whether one of these is not open yet."""
        return not self._waiting_to_open.isdisjoint(numbers)

    def have_ended(self, numbers: Sequence[int]) -> bool:
        """Whether all of these are closed, or have failed."""
        return bool(self.columns.gone[np.array(numbers, np.int64)].all())

    def resume_point(self, number: int) -> ResumePoint:
        """Where the session stands."""
        named, c = self._named[number], self.columns
        handed, reset = int(c.handed_step[number]), int(c.reset_step[number])
        return ResumePoint(named.id, named.token.hex(), handed, 0 < reset == handed)

    # What the caller wants.

    def add(self, name: str | None, resume: ResumePoint | None = None) -> int:
        """A session, to be opened. Raises FieldInvalid, ValueError."""
        name = resume.session if resume else name
        name = checked_session_id(name) if name is not None else uuid.uuid4().hex
        number = len(self._named)
        self.columns.make_room(number + 1)
        token = token_bytes(resume.token) if resume else secrets.token_bytes(16)
        self._named.append(Named(name, token, taken_over=resume is not None))
        self._numbers[name] = number
        self.columns.handle[number] = NO_HANDLE
        if resume:
            for column in (self.columns.next_step, self.columns.answered_step, self.columns.handed_step):
                column[number] = resume.answered_step
        self._waiting_to_open.add(number)
        return number

    def opens(self, numbers: Sequence[int]) -> list[Request]:
        """The requests to open these on this call."""
        self._attempts -= 1
        return [] if self._cut else list(map(self._open, numbers))

    def steps(self, numbers: Integers, inputs: npt.NDArray[np.generic]) -> list[Request]:
        """The next step of each: what can be sent now; the rest waits."""
        steps = self.columns.next_step[numbers]
        self.columns.next_step[numbers] = steps + 1
        return self._made(Sent(numbers, steps, inputs))

    def resets(self, numbers: Integers) -> list[Request]:
        """Back to the initial state before the next step of each."""
        return self._made(Sent(numbers, self.columns.next_step[numbers], None))

    def closes(self, numbers: Sequence[int]) -> list[Request]:
        """The end of these, behind everything that was made for them."""
        self._to_close.update(number for number in numbers if not self.columns.gone[number])
        return self._pump()

    def limit_closing(self, timeout_s: float) -> None:
        """From now on nothing is resumed for longer than this, and no session begun anew."""
        for named in self._named:
            named.leaving = True
        self._resumption.limit(timeout_s)

    def hand_over(self, arrived: Arrived) -> None:
        """The caller has these."""
        c = self.columns
        rows = arrived.steps >= 0
        numbers = arrived.numbers[rows]
        c.handed_step[numbers] = np.maximum(c.handed_step[numbers], arrived.steps[rows] + 1)

    # What happens on the call.

    def begin(self) -> MultiplexTurn:
        """What comes before anything else: a new call where the last one was given up."""
        if self._cut and self.failure is None:
            return Turn(requests=self._reopen(), reconnect_after_s=0.0)
        return Turn()

    def handle(self, response: pb.MultiplexStepsResponse) -> MultiplexTurn:
        """What has arrived with a response, and what is to be sent because of it."""
        arrived: list[Arrived] = []
        requests: list[Request] = []
        match response.WhichOneof("response"):
            case "answer":
                arrived = self._answered(response.answer)
            case "opened":
                arrived = self._opened(response.opened)
            case "refused":
                arrived = self._refused(response.refused)
            case "reset":
                self._reset(response.reset)
            case "closed":
                self._closed(response.closed)
            case "ended":
                arrived, requests = self._ended(response.ended)
            case "durable":
                self._became_durable(integers(response.durable.handles), response.durable.durable_steps)
            case "notice":
                self.announcer.announce(notice_from(response.notice))
        self._resumption.progress()
        self._kept.prune(self.columns)
        return Turn([*requests, *self._pump()], arrived)

    def cut(self, error: RnnserveError) -> MultiplexTurn:
        """The call has ended: opens all sessions again, unless that is hopeless. Then `failure` says why."""
        was_open = any(named.was_open for named in self._named)
        self._lose_call()
        resumes = self._resumes_after(error, was_open=was_open)
        pause_s = self._resumption.pause_s(error.retry_after_s) if resumes else None
        if pause_s is None:
            self.failure = self.failure or error
            return Turn()
        if was_open:
            self.announcer.interrupted(error)
        arrived = self._end_what_is_not_kept(error)
        return Turn(requests=self._reopen(), results=arrived, reconnect_after_s=pause_s)

    def lose(self) -> None:
        """The call has ended; the next use begins a new one."""
        self._lose_call()

    def _lose_call(self) -> None:
        c = self.columns
        self._cut = True
        c.handle[:] = NO_HANDLE
        c.owed[:] = 0
        c.stale[:] = 0
        self._handles = 0
        self._unsent.clear()
        self._to_resume.clear()
        self._to_close |= self._closing
        self._closing.clear()
        self._waiting_to_open = {number for number in self._numbers.values() if not c.gone[number]}

    def _reopen(self) -> list[Request]:
        self._cut = False
        self._attempts -= 1
        return [self._open(number) for number in sorted(self._waiting_to_open)]

    def _resumes_after(self, error: RnnserveError, *, was_open: bool) -> bool:
        if not was_open:
            again = isinstance(error, Unreachable) or (isinstance(error, TimedOut) and self._other_connections)
            return again and self._attempts > 0
        if all(named.durability == "none" for named in self._named if named.was_open and not named.failure):
            return False
        if isinstance(error, StreamClosed):
            return error.code == "OK"  # ended by the server, not here
        return isinstance(error, TryAgain | TimedOut)

    def _end_what_is_not_kept(self, error: RnnserveError) -> list[Arrived]:
        """The sessions that the server does not keep without a stream."""
        lost = [
            number for number in self._waiting_to_open
            if self._named[number].was_open and self._named[number].durability == "none"
        ]  # fmt: skip
        return [self._fail(number, error) for number in lost]

    def _open(self, number: int) -> Request:
        """One that can be built from its beginning is not asked to be there: the server may have lost it."""
        named, c = self._named[number], self.columns
        handle = self._handles
        self._handles += 1
        if handle >= len(self._number_of):
            self._number_of = np.resize(self._number_of, max(64, 2 * len(self._number_of)))
        self._number_of[handle] = number
        self._waiting_to_open.add(number)
        request = Request(open=pb.OpenHandle(handle=handle, open=self._opening, answered_step=c.handed_step[number]))
        opening = request.open.open
        opening.session_id, opening.resume_token = named.id, named.token
        complete = c.kept_step[number] == 0
        opening.resume = named.taken_over or (named.was_open and (named.leaving or not complete))
        opening.rebuild = named.was_open and not opening.resume
        opening.take_over = named.taken_over and not named.was_open
        return request

    def _made(self, sent: Sent) -> list[Request]:
        self._kept.add(sent)
        is_open = self.columns.handle[sent.numbers] != NO_HANDLE
        if is_open.any():
            self._unsent.append(sent.where(is_open))
        return self._pump()

    def _pump(self) -> list[Request]:
        """What can be sent now: of a session that has its limit outstanding nothing more, and nothing out of order."""
        if self._to_resume and not self._waiting_to_open:
            self._send_again()
        requests: list[Request] = []
        c, limit = self.columns, self._limits.max_outstanding_steps
        for _ in range(len(self._unsent)):
            sent = self._unsent.popleft()
            may_go = c.owed[sent.numbers] < limit
            if may_go.any():
                requests += self._send(sent.where(may_go))
            if not may_go.all():
                self._unsent.append(sent.where(~may_go))
        for number in [n for n in self._to_close if c.handle[n] != NO_HANDLE and not c.owed[n]]:
            requests.append(self._close(number))
        return requests

    def _send(self, sent: Sent) -> list[Request]:
        c, numbers = self.columns, sent.numbers
        c.owed[numbers] += 1
        if sent.inputs is None:
            return list(map(self._reset_request, numbers.tolist(), sent.steps.tolist()))
        c.sent_step[numbers] = np.maximum(c.sent_step[numbers], sent.steps + 1)
        limits = self._limits.opened
        parts = sent.parts(limits.max_steps_per_message, limits.max_message_bytes)
        return [steps_request(c.handle[part.numbers], part, c.handed_step[part.numbers]) for part in parts]

    def _reset_request(self, number: int, step: int) -> Request:
        c = self.columns
        reset = pb.ResetHandle(
            handle=c.handle[number], reset=pb.ResetSession(first_step=step), answered_step=c.handed_step[number]
        )
        return Request(reset=reset)

    def _close(self, number: int) -> Request:
        self._to_close.discard(number)
        self._closing.add(number)
        c = self.columns
        c.owed[number] += 1
        close = pb.CloseSession(first_step=int(c.next_step[number]))
        answered_step = c.answered_step[number]  # who closes wants no more answers
        return Request(close=pb.CloseHandle(handle=c.handle[number], close=close, answered_step=answered_step))

    def _send_again(self) -> None:
        """What the sessions lack that are open again, behind what others wait to send."""
        c = self.columns
        resumed = np.zeros(len(c.owed), np.bool_)
        for number, handle in self._to_resume.items():
            resumed[number], c.handle[number] = True, handle
        self._to_resume.clear()
        for sent in self._kept:
            again = resumed[sent.numbers] & (sent.steps >= c.sent_step[sent.numbers])
            if again.any():
                self._unsent.append(sent.where(again))

    def _opened(self, response: pb.HandleOpened) -> list[Arrived]:
        number, opened = int(self._number_of[response.handle]), response.opened
        named, c, index = self._named[number], self.columns, opened.next_step
        self._limits = response
        self._waiting_to_open.discard(number)
        if named.durability != "stored" or opened.durability == pb.DURABILITY_NONE:
            named.durability = durability_from(opened)  # once stored, an outage ends nothing
        c.stored[number] = named.durability == "stored"
        c.durable_step[number] = max(c.durable_step[number], response.durable_step)
        if not named.was_open:
            self._begin_at(number, index)
        arrived = [part for missed in response.missed for part in self._missed(number, missed)]
        if index > c.sent_step[number]:
            return [*arrived, self._lose(number, f"the server expects step {index}, but fewer were sent")]
        if index < c.kept_step[number]:
            lost = f"the server has lost the steps from {index} on, which are no longer kept here"
            return [*arrived, self._lose(number, lost, expected_step=index)]
        c.sent_step[number] = index
        self._to_resume[number] = response.handle
        if not self._waiting_to_open:
            self.announcer.resumed()
        return arrived

    def _begin_at(self, number: int, index: int) -> None:
        """The first time: a new session, or one taken over from another stream."""
        named, c = self._named[number], self.columns
        named.was_open = True
        if not named.taken_over:
            c.answered_step[number] = c.handed_step[number] = index
        c.sent_step[number] = index
        c.kept_step[number] = index
        if index > c.next_step[number]:
            c.next_step[number] = index

    def _missed(self, number: int, answer: pb.StepsAnswer) -> list[Arrived]:
        rows = len(answer.prediction.outputs.shape) and answer.prediction.outputs.shape[0]
        steps = np.arange(answer.first_step, answer.first_step + rows)
        return self._take(np.full(rows, number), steps, answer)

    def _answered(self, answer: pb.StepBatchAnswer) -> list[Arrived]:
        numbers = self._became_durable(integers(answer.handles), answer.durable_steps)
        self.columns.owed[numbers] -= 1
        if not answer.HasField("prediction"):
            return []
        return self._take(numbers, integers(answer.first_steps), answer)

    def _take(self, numbers: Integers, steps: Integers, answer: pb.StepBatchAnswer | pb.StepsAnswer) -> list[Arrived]:
        """The rows that are new."""
        c = self.columns
        new = steps >= c.answered_step[numbers]
        if not new.any():
            return []
        c.answered_step[numbers[new]] = steps[new] + 1
        return [Arrived.from_prediction(numbers, steps, answer.prediction, new)]

    def _became_durable(self, handles: Integers, durable_steps: Sequence[int]) -> Integers:
        """The numbers of these handles."""
        c, numbers = self.columns, self._number_of[handles]
        steps = integers(durable_steps)
        c.durable_step[numbers] = np.maximum(c.durable_step[numbers], steps)
        for number in numbers[(steps > 0) & (c.stored[numbers] == 0)]:
            self._named[number].durability = "stored"  # the store works again
            c.stored[number] = 1
        return numbers

    def _reset(self, reset: pb.HandleReset) -> None:
        (number,) = self._became_durable(np.array([reset.handle]), [reset.durable_step])
        c = self.columns
        c.owed[number] -= 1
        c.reset_step[number] = max(c.reset_step[number], reset.next_step)

    def _refused(self, refused: pb.HandlesRefused) -> list[Arrived]:
        """The first refusal of a session takes its later steps with it, which are refused for its sake."""
        error, c = error_from_status(refused.error), self.columns
        numbers, steps = self._number_of[integers(refused.handles)], integers(refused.first_steps)
        known = c.handle[numbers] == integers(refused.handles)
        numbers, steps = numbers[known], steps[known]
        c.owed[numbers] -= 1
        arrived = [self._fail(number, error) for number in self._closing.intersection(numbers.tolist())]
        stale = c.stale[numbers] > 0
        c.stale[numbers[stale]] -= 1
        first = numbers[~stale]
        if len(first):
            arrived.append(self._drop(first, steps[~stale], error))
        again = c.answered_step[first] > steps[~stale]
        message = f"the server refused steps that it had answered before: {error.message}"
        return [*arrived, *(self._lose(number, message) for number in first[again].tolist())]

    def _drop(self, numbers: Integers, steps: Integers, error: RnnserveError) -> Arrived:
        """What was refused is for the caller to decide, so it is not sent again."""
        c = self.columns
        end = np.full(len(c.owed), np.iinfo(np.int64).max)
        end[numbers] = steps
        self._kept.drop_from(end, c)
        self._unsent = deque(
            rest for sent in self._unsent if len((rest := sent.where(sent.steps < end[sent.numbers])).numbers)
        )
        c.stale[numbers] = c.owed[numbers]
        c.next_step[numbers] = np.minimum(c.next_step[numbers], steps)
        c.sent_step[numbers] = np.minimum(c.sent_step[numbers], steps)
        return Arrived.from_errors({int(number): error for number in numbers})

    def _closed(self, closed: pb.HandleClosed) -> None:
        number = int(self._number_of[closed.handle])
        self._end(number)
        self._closing.discard(number)
        if not closed.closed.erased and self._named[number].durability != "none":
            self._announce_not_erased(number)

    def _ended(self, ended: pb.HandlesEnded) -> tuple[list[Arrived], list[Request]]:
        error = error_from_status(ended.error)
        arrived, requests = [], []
        for number in self._number_of[integers(ended.handles)].tolist():
            self._waiting_to_open.discard(number)
            if number in self._closing | self._to_close and isinstance(error, SessionNotFound):
                self._end(number)
            elif isinstance(error, Evicted) and error.metadata.get("resumable") == "true":
                self._leave_call(number)
                requests.append(self._open(number))
            else:
                arrived.append(self._fail(number, error))
        return arrived, requests

    def _leave_call(self, number: int) -> None:
        c = self.columns
        c.handle[number], c.owed[number], c.stale[number] = NO_HANDLE, 0, 0
        self._to_resume.pop(number, None)
        self._unsent = deque(rest for sent in self._unsent if len((rest := sent.where(sent.numbers != number)).numbers))

    def _lose(self, number: int, message: str, **metadata: int) -> Arrived:
        known = {name: str(value) for name, value in metadata.items()}
        return self._fail(number, ResumePointLost(message, reason="RESUME_POINT_LOST", metadata=known))

    def _fail(self, number: int, error: RnnserveError) -> Arrived:
        """The session has ended; its neighbours go on."""
        self._named[number].failure = error
        self._end(number)
        return Arrived.from_errors({number: error})

    def _end(self, number: int) -> None:
        named = self._named[number]
        self._leave_call(number)
        self._waiting_to_open.discard(number)
        self._closing.discard(number)
        self._to_close.discard(number)
        self.columns.gone[number] = 1
        if named.failure is None:
            self._numbers.pop(named.id, None)

    def _announce_not_erased(self, number: int) -> None:
        message = (
            f"the server has not said that session {self._named[number].id!r} is erased; it may stay parked for its "
            "resume window"
        )
        self.announcer.announce(Notice("not_erased", message))


def _zeros() -> Integers:
    return np.zeros(0, np.int64)
