"""The bookkeeping of one stream, without I/O: which steps were sent, and what the next response is about."""

import re
import uuid
from collections import deque

from rnnserve.errors import FieldInvalid, RnnserveError
from rnnserve.exchange import Event, InputsEnded, NextInput, Response, Turn
from rnnserve.requests import steps_message
from rnnserve.results import Answer, Notice, answers_from, notice_from
from rnnserve.statuses import error_from_status
from rnnserve.tensors import Input
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.real_time_service_pb2 import (
    CloseSession,
    OpenSession,
    ResetSession,
    StepsAnswer,
    StreamStepsRequest,
    StreamStepsResponse,
)

SESSION_ID_KEY = "rnnserve-session-id"


class Session:
    """Makes the requests of one session and reads the responses, which come in the order of the requests.

    A refused message leaves the session as it was, so the messages sent behind it are refused, too. The first refusal
    is kept in `refusal`; once nothing is outstanding, `next_step` is the index that the server expects.
    """

    def __init__(self, model: str, version: int, session_id: str | None, options: OutputOptions) -> None:
        self.id = _checked(session_id) if session_id is not None else uuid.uuid4().hex
        self.next_step = 0
        self.notices: list[Notice] = []
        self.refusal: RnnserveError | None = None
        self._opening = OpenSession(model=model, version=version, session_id=self.id, options=options)
        self._outstanding: deque[int] = deque()  # the first step of each request that awaits its response

    @property
    def outstanding(self) -> int:
        """How many responses the server owes."""
        return len(self._outstanding)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The session id for load balancers, which don't read messages."""
        return ((SESSION_ID_KEY, self.id),)

    def open(self) -> StreamStepsRequest:
        """The first message."""
        return self._sent(StreamStepsRequest(open=self._opening))

    def steps(self, x: Input) -> StreamStepsRequest:
        """The next steps: (features,), (steps, features), or a text. Raises ShapeMismatch or DataTypeMismatch."""
        message, count = steps_message(self.next_step, x)
        return self._sent(StreamStepsRequest(steps=message), count)

    def reset(self) -> StreamStepsRequest:
        """Back to the initial state."""
        return self._sent(StreamStepsRequest(reset=ResetSession(first_step=self.next_step)))

    def close(self) -> StreamStepsRequest:
        """The last message."""
        return self._sent(StreamStepsRequest(close=CloseSession()))

    def receive(self, response: StreamStepsResponse) -> list[Answer]:
        """The answers in a response."""
        kind = response.WhichOneof("response")
        if kind == "notice":
            self.notices.append(notice_from(response.notice))
            return []
        first_step = self._outstanding.popleft()
        if kind == "error":
            self._refuse(error_from_status(response.error), first_step)
        elif kind == "opened":
            self.next_step = response.opened.next_step
        return self._answered(response.answer) if kind == "answer" else []

    @staticmethod
    def last(answers: list[Answer]) -> Answer:
        """The answer about the last step."""
        if not answers:
            raise RnnserveError("the server answered without an output")
        return answers[-1]

    def take_refusal(self) -> RnnserveError | None:
        """What was refused since the last time, if anything."""
        refusal, self.refusal = self.refusal, None
        return refusal

    def _sent(self, request: StreamStepsRequest, steps: int = 0) -> StreamStepsRequest:
        self._outstanding.append(self.next_step)
        self.next_step += steps
        return request

    def _answered(self, answer: StepsAnswer) -> list[Answer]:
        if answer.HasField("failure"):
            self._refuse(error_from_status(answer.failure), answer.next_step)
        return answers_from(answer)

    def _refuse(self, error: RnnserveError, next_step: int) -> None:
        if self.refusal is None:
            self.refusal, self.next_step = error, next_step


def _checked(session_id: str) -> str:
    """The same id. Checked here because it travels as metadata, where other characters break the call."""
    if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", session_id):
        return session_id
    message = f"a session id has 1 to 128 characters of A-Z, a-z, 0-9, '.', '_', '-', ':', unlike {session_id!r}"
    raise FieldInvalid(message, reason="FIELD_INVALID", code="INVALID_ARGUMENT", field="open.session_id")


class StepsAhead:
    """Steps sent ahead of their answers. After the first failure nothing more is sent."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ended = False
        self._input_error: BaseException | None = None

    @property
    def failure(self) -> BaseException | None:
        """The first thing that failed, in the order of the steps."""
        return self._session.refusal or self._input_error

    @property
    def waiting(self) -> bool:
        """Whether the server owes an answer."""
        return self._session.outstanding > 0

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return (self._ended or self.failure is not None) and not self.waiting

    def handle(self, event: Event[Input, StreamStepsResponse]) -> Turn[StreamStepsRequest, Answer]:
        """What to do now."""
        match event:
            case NextInput(value):
                return Turn(requests=self._request(value))
            case Response(message):
                before = self._session.outstanding
                answers = self._session.receive(message)
                return Turn(results=answers, places=before - self._session.outstanding)
            case InputsEnded(error):
                self._ended = True
                self._input_error = self._input_error or error
                return Turn()

    def _request(self, x: Input) -> list[StreamStepsRequest]:
        if self._ended or self.failure is not None:
            return []
        try:
            return [self._session.steps(x)]
        except RnnserveError as error:
            self._input_error = error
            return []
