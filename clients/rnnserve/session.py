"""The bookkeeping of one session, without I/O: what was sent, what was answered, and how to go on after a cut."""

import re
import secrets
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from rnnserve.errors import (
    Evicted,
    FieldInvalid,
    ResumePointLost,
    RnnserveError,
    SessionMoved,
    SessionNotFound,
    StreamClosed,
    TimedOut,
    TryAgain,
    Unreachable,
)
from rnnserve.exchange import Turn
from rnnserve.notices import Notices
from rnnserve.replay import Message, Replay
from rnnserve.requests import checked_version, steps_message
from rnnserve.results import NO_ANSWER, Answer, Notice, ResumePoint, answers_from, notice_from
from rnnserve.retry import Resumption
from rnnserve.statuses import error_from_status
from rnnserve.tensors import Input
from rnnserve.texts import TextSteps, TextUnit, text_steps, unit_from
from rnnserve.v1 import real_time_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import STEP_SELECTION_ALL, OutputOptions

_Inputs = TypeVar("_Inputs")

SESSION_ID_KEY = "rnnserve-session-id"
RESUME_TIMEOUT_S = 60.0
MOVED_PAUSE_S = 0.5  # whoever has the session now writes so in its store

Durability = Literal["none", "process", "stored"]
"""What a session survives: nothing, the end of its stream, or also a crash of the server."""

_DURABILITIES: dict[int, Durability] = {pb.DURABILITY_PROCESS: "process", pb.DURABILITY_STORED: "stored"}


@dataclass(frozen=True)
class _Owed:
    """A response that the server owes: to an open or a close, to a message, or answers missed up to `end`."""

    first: int = 0
    message: Message | None = None
    end: int | None = None


class Session:
    """Makes the requests of one session and reads the responses, which come in the order of the requests.

    A refused message leaves the session as it was, so the messages sent behind it are refused, too. The first refusal
    is kept in `refusal`; once nothing is outstanding, `next_step` is the index that the server expects.

    After `cut` it goes on where it was, if the server keeps the session: it opens it again and sends again what the
    server does not have. What the caller has already got is dropped.

    `on_notice` is called with each notice when it comes.
    """

    def __init__(
        self,
        model: str,
        version: int,
        session_id: str | None,
        options: OutputOptions,
        *,
        resume: ResumePoint | None = None,
        durable: bool = False,
        replay: Replay | None = None,
        resume_timeout_s: float = RESUME_TIMEOUT_S,
        open_attempts: int = 1,
        other_connections: bool = False,
        on_notice: Callable[[Notice], object] | None = None,
    ) -> None:
        if resume is not None and session_id not in (None, resume.session):
            raise ValueError("a resume point names its session: leave `session` out")
        session_id = session_id if resume is None else resume.session
        self.id = checked_session_id(session_id) if session_id is not None else uuid.uuid4().hex
        self.next_step = resume.answered_step if resume else 0
        self.answered_step = self.next_step  # each answer about a step before it has come
        self.handed_step = self.next_step  # each of those is with the caller; what the server is told
        self.taken_step = self.next_step  # each step before it is in the state, answered about or not yet
        self.durable_step = 0
        self.durability: Durability = "none"
        self._unit: TextUnit | None = None  # known once the session is open
        self._notices = Notices(on_notice)
        self.refusal: RnnserveError | None = None
        self.failure: RnnserveError | None = None
        self._token = resume_token(resume.token) if resume else secrets.token_bytes(16)
        self._opening = pb.OpenSession(
            model=model,
            version=checked_version(version),
            session_id=self.id,
            options=options,
            resume_token=self._token,
            require_durable=durable,
            caller_id=secrets.token_bytes(16),
        )
        self._answers_each_step = options.steps == STEP_SELECTION_ALL
        self._taken_over = resume is not None
        self._replay = replay or Replay()
        self._resumption = Resumption(resume_timeout_s)
        self._open_attempts = open_attempts  # left for the first open
        self._other_connections = other_connections  # on which a server may answer where one is stuck
        self._state: Literal["new", "opening", "open", "cut"] = "new"
        self._was_open = False
        self._interrupted = False  # and not resumed yet
        self._leaving = False
        self._closing = False
        self._erased = False
        self._sent_step = self.next_step  # no step from here on was ever sent
        self._acknowledged = 0  # what the last open said
        self._look_ahead = 0
        self._owed: deque[_Owed] = deque()
        self._unanswered: deque[Message] = deque()
        self._again: list[pb.StreamStepsRequest] = []
        self._break: RnnserveError | None = None
        self._reset_step = 0  # the last reset that was answered came before this one
        if resume is not None and resume.reset:
            self.reset()

    @property
    def notices(self) -> list[Notice]:
        """All so far."""
        return self._notices.told

    @property
    def outstanding(self) -> int:
        """How many responses the server owes; several missed answers count as one."""
        return len(self._owed)

    @property
    def unanswered(self) -> int:
        """How many messages have no answer yet, over all calls."""
        return len(self._unanswered)

    @property
    def ready(self) -> bool:
        """Whether a request may be sent as soon as it is made; else it goes out once the session is open again."""
        return self._state in ("new", "open")

    @property
    def full(self) -> bool:
        """Whether no more steps should be made, for they could not be kept."""
        return self._replay.full

    @property
    def resume_point(self) -> ResumePoint:
        """Where the session stands, for another stream to go on."""
        return ResumePoint(self.id, self._token.hex(), self.handed_step, 0 < self._reset_step == self.handed_step)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The session id for load balancers, which don't read messages."""
        return ((SESSION_ID_KEY, self.id),)

    def begin(self) -> Turn[pb.StreamStepsRequest, Answer]:
        """What comes before anything else: a new call where the last one was given up."""
        if self._state == "cut" and self.failure is None:
            return Turn(requests=[self.open()], reconnect_after_s=0.0)
        return Turn()

    def open(self) -> pb.StreamStepsRequest:
        """The first message of a call.

        A session that can be built from its beginning is not asked to be there: the server may have lost it. Only the
        first time it is taken from whoever has it.
        """
        self._state, self._acknowledged = "opening", self.handed_step
        self._open_attempts -= 1
        self._owed = deque([_Owed()])
        request = pb.StreamStepsRequest(open=self._opening, answered_step=self.handed_step)
        request.open.resume = self._taken_over or (self._was_open and (self._leaving or not self._replay.complete))
        request.open.rebuild = self._was_open and not request.open.resume
        request.open.take_over = self._taken_over and not self._was_open
        return request

    def steps(self, x: Input) -> pb.StreamStepsRequest:
        """The next steps: (features,), (steps, features), or a text. Raises ShapeMismatch or DataTypeMismatch."""
        message, count = steps_message(self.next_step, x, self._unit)
        return self._made(Message(self.next_step, self.next_step + count, message, self._unit))

    def each(self, inputs: _Inputs) -> _Inputs | TextSteps:
        """The same inputs; of one text its steps."""
        return text_steps(inputs, self._unit) if isinstance(inputs, str) else inputs

    def reset(self) -> pb.StreamStepsRequest:
        """Back to the initial state."""
        return self._made(Message(self.next_step, self.next_step, None))

    def limit_closing(self, timeout_s: float) -> None:
        """From now on nothing is resumed for longer than this, and no session begun anew."""
        self._leaving = True
        self._resumption.limit(timeout_s)

    def close(self) -> pb.StreamStepsRequest:
        """The last message. What a look-ahead keeps to come is not wanted any more."""
        self._closing = True
        if self._state == "open":
            self._owed.append(_Owed(self.next_step))
        closing = pb.CloseSession(first_step=self.next_step)
        answered_step = self.next_step if self._look_ahead else self.handed_step
        return pb.StreamStepsRequest(close=closing, answered_step=answered_step)

    def closed(self) -> None:
        """The last use of the session; the caller is told where the server did not say that nothing is left of it."""
        if self.durability != "none" and not self._erased:
            message = "the server has not said that the session is erased; it may stay parked for its resume window"
            self._notices.tell(Notice("not_erased", message))

    def receive(self, response: pb.StreamStepsResponse) -> list[Answer]:
        """The new answers in a response."""
        if response.durable_step > self.durable_step:
            self.durable_step = response.durable_step
            if self.durability == "process":  # the store works again
                self.durability = "stored"
        kind = response.WhichOneof("response")
        answers: list[Answer] = []
        if kind == "notice":
            self._notices.tell(notice_from(response.notice))
        elif kind not in ("checkpoint", None):
            answers = self._responded(response)
        self._replay.prune(self.durable_step if self.durability == "stored" else None)
        return answers

    def handle(self, response: pb.StreamStepsResponse) -> Turn[pb.StreamStepsRequest, Answer]:
        """The new answers in a response, and what is to be sent again because of it."""
        unanswered = self.unanswered
        answers = self.receive(response)
        places = unanswered - self.unanswered
        if places or not unanswered:
            self._resumption.progress()
        if self._break is not None:
            error, self._break = self._break, None
            return self.cut(error)
        again, self._again = self._again, []
        return Turn(again, answers, places)

    def cut(self, error: RnnserveError) -> Turn[pb.StreamStepsRequest, Answer]:
        """The call has ended: opens the session again, unless that is hopeless. Then `failure` says why."""
        # Perhaps by an open of ours that was given up and came late; if by another caller, the open will say so.
        was_moved = isinstance(error, SessionMoved) and self._state == "open"
        self.lose()
        if self._closing and isinstance(error, SessionNotFound):
            self._erased = True
            return Turn()
        resumes = self.durability != "none" if was_moved else self._resumes_after(error)
        pause_s = self._resumption.pause_s(MOVED_PAUSE_S if was_moved else error.retry_after_s) if resumes else None
        if pause_s is None:
            self.failure = self.failure or error
            return Turn()
        if not was_moved:
            self._interrupt(error)
        return Turn(requests=[self.open()], reconnect_after_s=pause_s)

    def lose(self) -> None:
        """The call has ended; the next use begins a new one."""
        self._state = "cut"
        self._owed.clear()
        self._again.clear()

    def hand_over(self, answer: Answer) -> None:
        """The caller has got this answer, and all before it."""
        self.handed_step = max(self.handed_step, answer.step + 1)

    def settle(self) -> None:
        """The caller wants none of the answers that have come so far."""
        self.handed_step = self.answered_step

    def last(self, answers: list[Answer]) -> Answer:
        """The last answer that a request has brought; with a look-ahead there may be none yet."""
        if not answers:
            if self._look_ahead:
                return NO_ANSWER
            raise RnnserveError("the server answered without an output")
        return answers[-1]

    def take_refusal(self) -> RnnserveError | None:
        """What was refused since the last time, if anything."""
        refusal, self.refusal = self.refusal, None
        return refusal

    def _resumes_after(self, error: RnnserveError) -> bool:
        if not self._was_open:
            again = isinstance(error, Unreachable) or (isinstance(error, TimedOut) and self._other_connections)
            return again and self._open_attempts > 0
        return self.durability != "none" and outlives(error)

    def _interrupt(self, error: RnnserveError) -> None:
        """Announced once, however many attempts follow. What never was open is not interrupted."""
        if self._was_open and not self._interrupted:
            self._interrupted = True
            message = f"the stream is interrupted and tries to resume: {without_advice(error.message)}"
            self._notices.tell(Notice("interrupted", message, error=error))

    def _resume(self, index: int) -> None:
        if self._interrupted:
            self._interrupted = False
            self._notices.tell(Notice("resumed", f"the stream goes on with step {index}", step=index))

    def _made(self, message: Message) -> pb.StreamStepsRequest:
        self._replay.add(message)
        self._unanswered.append(message)
        self.next_step = message.end
        request = self._request(message, message.first)
        if self._state == "open":
            self._send(message, message.first)
        return request

    def _request(self, message: Message, first: int) -> pb.StreamStepsRequest:
        if message.steps is None:
            return pb.StreamStepsRequest(reset=pb.ResetSession(first_step=first), answered_step=self.handed_step)
        steps = message.steps if first == message.first else message.part(first, message.end)
        return pb.StreamStepsRequest(steps=steps, answered_step=self.handed_step)

    def _send(self, message: Message, first: int) -> None:
        self._owed.append(_Owed(first, message))
        self._sent_step = max(self._sent_step, message.end)

    def _responded(self, response: pb.StreamStepsResponse) -> list[Answer]:
        if not self._owed:
            raise RnnserveError("the server answered what was not asked")
        owed = self._owed[0]
        answers = answers_from(response.answer)
        if owed.end is None or (response.HasField("answer") and response.answer.first_step + len(answers) >= owed.end):
            self._owed.popleft()
        if response.HasField("answer"):
            return self._answered(response.answer, answers, owed)
        if response.HasField("opened"):
            self._opened(response.opened)
        elif response.HasField("error"):
            self._refuse(error_from_status(response.error), owed, owed.first)
        elif response.HasField("closed"):
            self._erased = response.closed.erased
        elif owed.message is not None:
            owed.message.answered = True
            self._reset_step = max(self._reset_step, owed.message.first)
            return self._brought(response.reset.last, answers_from(response.reset.last))
        return []

    def _opened(self, opened: pb.SessionOpened) -> None:
        self._state, index = "open", opened.next_step
        self._unit = unit_from(opened.text_unit)
        self._look_ahead = opened.look_ahead
        if self.durability != "stored" or opened.durability == pb.DURABILITY_NONE:
            self.durability = _DURABILITIES.get(opened.durability, "none")  # once stored, an outage ends nothing
        if not self._was_open:
            self._begin_at(index, opened.pending_answers)
        self.taken_step = max(self.taken_step, index)
        if index > self._sent_step:
            self._break = resume_point_lost(f"the server expects step {index}, but only {self._sent_step} were sent")
        elif (again := self._replay.since(index, self.next_step)) is None:
            lost = f"the server has lost the steps from {index} on, which are no longer kept here"
            self._break = resume_point_lost(lost, expected_step=index)
        else:
            self._send_again(again, index, opened.pending_answers)
            self._resume(index)

    def _begin_at(self, index: int, pending: int) -> None:
        """The first time: a new session, or one taken over from another stream."""
        self._was_open = True
        if not self._taken_over:
            self.answered_step = self.handed_step = self._acknowledged = index - pending
        if index >= self.answered_step:
            self.next_step = self._sent_step = index

    def _send_again(self, again: list[Message], index: int, pending: int) -> None:
        if index - pending > self._acknowledged:
            self._owed.append(_Owed(self._acknowledged, end=index - pending))
        for message in self._unanswered:
            message.answered |= message.steps is None and message.first < index
        for message in again:
            first = max(message.first, index)
            self._again.append(self._request(message, first))
            self._send(message, first)
        if self._closing:
            self._again.append(self.close())
        self._drop_answered()  # what is not sent again is not answered any more

    def _answered(self, answer: pb.StepsAnswer, answers: list[Answer], owed: _Owed) -> list[Answer]:
        if answer.HasField("failure") and owed.message is not None:  # if missed, the steps sent again fail, too
            self._refuse(error_from_status(answer.failure), owed, answer.next_step)
        return self._brought(answer, answers)

    def _brought(self, answer: pb.StepsAnswer, answers: list[Answer]) -> list[Answer]:
        """Those of its answers that are new."""
        new = [row for row in answers if row.step >= self.answered_step]
        if self._answers_each_step and new and new[0].step > self.answered_step:
            self._break = resume_point_lost(f"the server left out the answers from step {self.answered_step} on")
        self.answered_step = max(self.answered_step, answer.first_step + len(answers))
        self.taken_step = max(self.taken_step, answer.next_step)
        self._drop_answered()
        return new

    def _drop_answered(self) -> None:
        while self._unanswered and self._is_answered(self._unanswered[0]):
            self._unanswered.popleft().answered = True

    def _is_answered(self, message: Message) -> bool:
        if message.steps is None:
            return message.answered or message.first < self.taken_step
        return message.end <= self.taken_step

    def _refuse(self, error: RnnserveError, owed: _Owed, index: int) -> None:
        message = owed.message
        if self._state == "opening" or (self.refusal is None and message is not None and self._is_replayed(owed)):
            self._break = error if self._state == "opening" or isinstance(error, TryAgain) else refused_again(error)
        elif self.refusal is None:
            self.refusal = error
            self.next_step = self._sent_step = index
            if message is not None:
                self._drop_from(message, index)

    def _is_replayed(self, owed: _Owed) -> bool:
        return (owed.message is not None and owed.message.answered) or owed.first < self.taken_step

    def _drop_from(self, message: Message, index: int) -> None:
        """What was refused is for the caller to decide, so it is not sent again."""
        self._replay.drop_from(message, index)
        while self._unanswered and self._unanswered.pop() is not message:
            pass
        if index > message.first:
            self._unanswered.append(message)  # its steps before the refused one
        self._drop_answered()


def outlives(error: RnnserveError) -> bool:
    """Whether a session that is parked outlives this."""
    if isinstance(error, Evicted):
        return error.metadata.get("resumable") == "true"
    if isinstance(error, StreamClosed):
        return error.code == "OK"  # ended by the server, not here
    return isinstance(error, TryAgain | TimedOut)


def resume_token(digits: str) -> bytes:
    """The bytes of a resume point's token. Raises ValueError."""
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise ValueError("the token of a resume point is hex digits") from None


def without_advice(message: str) -> str:
    """What happened, without what to do about it: that is for whoever has to do something."""
    return message.partition("; ")[0]


def resume_point_lost(message: str, **metadata: int) -> ResumePointLost:
    """The exception for a session that can't go on where it was."""
    known = {name: str(value) for name, value in metadata.items()}
    return ResumePointLost(message, reason="RESUME_POINT_LOST", metadata=known)


def refused_again(error: RnnserveError) -> ResumePointLost:
    """The exception for steps that were answered once, and are refused when they are sent again."""
    return resume_point_lost(f"the server refused steps that it had answered before: {error.message}")


def checked_session_id(session_id: str) -> str:
    """The same id. Checked here because it travels as metadata, where other characters break the call."""
    if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", session_id):
        return session_id
    message = f"a session id has 1 to 128 characters of A-Z, a-z, 0-9, '.', '_', '-', ':', unlike {session_id!r}"
    raise FieldInvalid(message, reason="FIELD_INVALID", code="INVALID_ARGUMENT", field="open.session_id")
