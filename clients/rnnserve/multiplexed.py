"""The bookkeeping of many sessions on one call, without I/O: what `Session` does for one, done for all of a batch.

Whatever is per session here happens only when it begins, ends or goes on; steps and their answers are arrays.
"""

import math
import secrets
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rnnserve.answered_rows import NO_ROWS, AnsweredRows, joined, rows_from
from rnnserve.batches import Backlog, Batch, BatchReplay, Inputs, bare, is_refused
from rnnserve.errors import RnnserveError, SessionMoved, SessionNotFound, TimedOut, TryAgain, Unreachable
from rnnserve.exchange import Turn
from rnnserve.notices import Notices
from rnnserve.replay import REPLAY_BUFFER_BYTES, WhenReplayFull
from rnnserve.requests import checked_version
from rnnserve.results import BatchAnswer, Notice, ResumePoint, notice_from
from rnnserve.retry import Resumption
from rnnserve.session import (
    MOVED_PAUSE_S,
    RESUME_TIMEOUT_S,
    Durability,
    checked_session_id,
    outlives,
    refused_again,
    resume_point_lost,
    resume_token,
    without_advice,
)
from rnnserve.session_table import NEVER, Ints, Mask, SessionTable
from rnnserve.statuses import error_from_status
from rnnserve.v1 import real_time_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

Requests = list[pb.MultiplexStepsRequest]

UNOPENED_STEPS = 8  # of a session that is being opened wait here at most
OPENINGS_PAUSE_S = 0.002  # for more sessions to be open before what waits for them is sent
_ROW_BYTES = 30  # at most: a handle and two indices of steps
_MESSAGE_BYTES = 100  # at most, besides its rows
_MAX_GROUPS = 64
_FIRST_CAPACITY = 64


class Multiplexed:
    """Makes the requests of many sessions and reads the responses, in which those of one session keep their order.

    Sessions are told by numbers. Requests of a session wait here while it is being opened, while it has as many
    outstanding as it may, and while what was sent behind a refused step is still being refused. The first error of
    each session is kept until the caller takes it; before that nothing more is made for it.

    After `cut` all sessions are opened again on the next call, with new handles, and get again what the server lacks.
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
        self.table = SessionTable()
        self._opening = pb.OpenSession(
            model=model,
            version=checked_version(version),
            options=options,
            require_durable=durable,
            caller_id=secrets.token_bytes(16),
        )
        self._replay = BatchReplay(self.table, replay_buffer_bytes, when_replay_full)
        self._backlog = Backlog(self.table)
        self._notices = Notices(on_notice)
        self._resume_timeout_s = resume_timeout_s
        self._resumption = Resumption(resume_timeout_s)
        self._open_attempts = open_attempts  # left before the first session is open
        self._other_connections = other_connections
        self._was_open = False
        self._is_cut = False
        self._is_interrupted = False
        self._is_leaving = False

        self._names: list[str] = []  # by number
        self._tokens: list[bytes] = []
        self._numbers: dict[str, int] = {}
        self._groups: dict[tuple[str, ...], Ints] = {}
        self._free: list[int] = []
        self._retired: list[int] = []  # free once nothing that is kept here has them

        self._number_of = np.full(_FIRST_CAPACITY, -1)  # by handle; 0 is none
        self._last_handle = 0
        self._owed = 0  # responses
        self._openings: set[int] = set()
        self._reopen_at_s: dict[int, float] = {}
        self._resumptions: dict[int, Resumption] = {}  # of sessions that were lost alone
        self._backlog_at_s = math.inf

        self._versions: set[int] = set()
        self._max_rows = 1
        self._max_message_bytes = 1 << 62
        self._outgoing: Requests = []

        self._arrived: list[AnsweredRows] = []
        self._like = NO_ROWS
        self._errors: dict[int, RnnserveError] = {}  # which the caller has not taken
        self._ends: dict[int, RnnserveError] = {}  # why sessions are over

    @property
    def notices(self) -> list[Notice]:
        """All so far."""
        return self._notices.told

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sessions that are not over."""
        return tuple(name for name, number in self._numbers.items() if number not in self._ends)

    @property
    def owes(self) -> bool:
        """Whether the server owes a response."""
        return self._owed > 0 or bool(self._openings)

    @property
    def pending(self) -> bool:
        """Whether an answer is still to come."""
        return self.owes or bool(self._backlog) or bool(self._reopen_at_s)

    @property
    def full(self) -> bool:
        """Whether no more steps should be made, for they could not be kept."""
        return self._replay.full

    @property
    def has_news(self) -> bool:
        """Whether `take` has something."""
        return bool(self._arrived) or bool(self._errors)

    @property
    def wake_after_s(self) -> float | None:
        """When `wake` has something to do."""
        at_s = min([self._backlog_at_s, *self._reopen_at_s.values()])
        return None if at_s == math.inf else max(0.0, at_s - time.monotonic())

    def has_room(self, numbers: Ints) -> bool:
        """Whether one more request of each may be made."""
        table = self.table
        return bool((table.outstanding[numbers] + table.waiting[numbers] < table.max_outstanding[numbers]).all())

    def are_settled(self, numbers: Ints, first_steps: Ints) -> bool:
        """Whether these steps were answered or refused, or their sessions are over."""
        table = self.table
        answered = table.answered_step[numbers] > first_steps
        return bool((answered | (table.next_step[numbers] <= first_steps) | table.is_over[numbers]).all())

    def are_idle(self, numbers: Ints) -> bool:
        """Whether all that was made for these is answered or refused."""
        table = self.table
        idle = table.is_open[numbers] & (table.outstanding[numbers] + table.waiting[numbers] == 0)
        return bool((idle | table.is_over[numbers]).all())

    def are_begun(self, numbers: Ints) -> bool:
        """Whether each of these is open or over."""
        return bool((self.table.is_open[numbers] | self.table.is_over[numbers]).all())

    def are_over(self, numbers: Ints) -> bool:
        """Whether nothing is sent for any of these any more."""
        return bool(self.table.is_over[numbers].all())

    # Names and numbers

    def numbers(self, names: Sequence[str]) -> Ints:
        """Of sessions, which begin if they are not known yet. Raises FieldInvalid, ValueError."""
        if isinstance(names, str):
            raise TypeError("sessions is a list of names; for one write [name]")
        group = tuple(names)
        numbers = self._groups.get(group)
        return self._grouped(group) if numbers is None else numbers

    def known(self, names: Iterable[str]) -> Ints:
        """The numbers of those that are known."""
        return np.array([self._numbers[name] for name in dict.fromkeys(names) if name in self._numbers], np.int64)

    def number(self, name: str) -> int:
        """Of a known session. Raises SessionNotFound."""
        if name in self._numbers:
            return self._numbers[name]
        raise SessionNotFound(f"{name!r} is not open on this call", reason="SESSION_NOT_FOUND", code="NOT_FOUND")

    def begin_again(self, names: Iterable[str]) -> None:
        """Sessions of these names that are over are forgotten, so that new ones may begin."""
        self.forget(self.known(names))

    def forget(self, numbers: Ints) -> None:
        """The names of those that are over."""
        self._forget([number for number in numbers.tolist() if number in self._ends])

    def resume(self, point: ResumePoint) -> None:
        """A session that another stream had. Raises ValueError if it is known already."""
        if point.session in self._numbers:
            raise ValueError(f"{point.session!r} is open on this call already")
        number, table = self._begin(point.session, resume_token(point.token)), self.table
        for steps in (table.next_step, table.sent_step, table.answered_step, table.handed_step, table.kept_step):
            steps[number] = point.answered_step
        table.is_taken_over[number] = True
        if point.reset:
            self.reset(np.array([number]))

    def resume_point(self, name: str) -> ResumePoint:
        """Where a session stands, for another stream to go on. Raises SessionNotFound."""
        number, table = self.number(name), self.table
        handed_step = int(table.handed_step[number])
        was_reset = 0 < table.reset_step[number] == handed_step and not table.resets[number]
        return ResumePoint(name, self._tokens[number].hex(), handed_step, bool(was_reset))

    def durability(self, name: str) -> Durability:
        """What a session survives. Raises SessionNotFound."""
        number, table = self.number(name), self.table
        if not table.is_parkable[number]:
            return "none"
        return "stored" if table.is_stored[number] else "process"

    # What the caller wants

    def begin(self) -> Turn[pb.MultiplexStepsRequest, None]:
        """What comes before anything else: a new call where the last one was given up."""
        if self._is_cut and self.failure is None:
            return Turn(requests=self._open_all(), reconnect_after_s=0.0)
        return self._turn()

    def steps(self, numbers: Ints, inputs: Inputs) -> None:
        """The next step of each; none of those that have an error."""
        self._make(Batch("steps", numbers, self.table.next_step[numbers], inputs))

    def reset(self, numbers: Ints) -> None:
        """Back to the initial state."""
        self._make(bare("reset", numbers, self.table.next_step[numbers]))

    def close(self, numbers: Ints) -> None:
        """Ends these sessions."""
        numbers = numbers[~self.table.is_over[numbers] & ~self.table.is_closing[numbers]]
        self.table.is_closing[numbers] = True
        self._make(bare("close", numbers, self.table.next_step[numbers]))

    def limit_closing(self, timeout_s: float) -> None:
        """From now on nothing is resumed for longer than this, and no session begun anew."""
        self._is_leaving = True
        self._resumption.limit(timeout_s)
        for resumption in self._resumptions.values():
            resumption.limit(timeout_s)

    def closed(self) -> None:
        """The last use: the caller is told of each session of which the server did not say that nothing is left."""
        for name in self.names:
            if self.table.is_parkable[self._numbers[name]]:
                self._tell_not_erased(name)

    def take(self) -> BatchAnswer | None:
        """All that has come, and the errors; None = nothing."""
        if not self.has_news:
            return None
        missing = np.array(list(self._errors), np.int64)
        rows = joined([*self._arrived, self._like.missing(missing)] if len(missing) else self._arrived)
        self._arrived = []
        self._hand_over(rows)
        return rows.answer([self._names[number] for number in rows.numbers.tolist()], self._taken_errors(missing))

    def take_steps(self, names: Sequence[str], numbers: Ints, first_steps: Ints) -> BatchAnswer:
        """The answers to these steps, in their order."""
        rows = self._rows_of(numbers, first_steps)
        self._hand_over(rows)
        unanswered = numbers[rows.steps < 0]
        return rows.answer(names, self._taken_errors(unanswered) if len(unanswered) else {})

    def take_error(self, numbers: Ints) -> RnnserveError | None:
        """The first error of these sessions; the others stay."""
        for number in numbers.tolist():
            if number in self._errors or number in self._ends:
                return next(iter(self._taken_errors(np.array([number])).values()))
        return None

    def outgoing(self) -> Requests:
        """What is to be sent now."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    # What happens

    def handle(self, response: pb.MultiplexStepsResponse) -> Turn[pb.MultiplexStepsRequest, None]:
        """Reads a response."""
        match response.WhichOneof("response"):
            case "answer":
                self._answered(response.answer)
            case "opened":
                self._opened(response.opened)
            case "refused":
                self._refused(response.refused)
            case "reset":
                self._was_reset(response.reset)
            case "closed":
                self._closed(response.closed)
            case "ended":
                error = error_from_status(response.ended.error)
                self._lose(self._bound(response.ended.handles), error)
            case "durable":
                self._became_durable(response.durable)
            case "notice":
                self._notices.tell(notice_from(response.notice))
        return self._turn()

    def wake(self) -> Turn[pb.MultiplexStepsRequest, None]:
        """Does what it is time for."""
        now_s = time.monotonic()
        due = [number for number, at_s in self._reopen_at_s.items() if at_s <= now_s]
        self._outgoing += map(self._open, due)
        return self._turn()

    def cut(self, error: RnnserveError) -> Turn[pb.MultiplexStepsRequest, None]:
        """The call has ended: opens all sessions on a new one, unless that is hopeless. Then `failure` says why."""
        self.lose()
        pause_s = self._resumption.pause_s(error.retry_after_s) if self._resumes_after(error) else None
        if pause_s is None:
            self.failure = self.failure or error
            return Turn()
        table = self.table
        self._end(np.flatnonzero(table.was_open & ~table.is_parkable & ~table.is_over), error)
        if self._was_open and not self._is_interrupted:
            self._is_interrupted = True
            message = f"the call is interrupted and tries to resume: {without_advice(error.message)}"
            self._notices.tell(Notice("interrupted", message, error=error))
        return Turn(requests=self._open_all(), reconnect_after_s=pause_s)

    def lose(self) -> None:
        """The call has ended; the next use begins a new one."""
        self._is_cut = True
        self._unbind(np.flatnonzero(self.table.handle))
        self._openings.clear()
        self._outgoing.clear()

    # Beginning and ending sessions

    def _grouped(self, group: tuple[str, ...]) -> Ints:
        if len(set(group)) < len(group):
            raise ValueError("each session may be named once")
        for name in group:
            checked_session_id(name)
        numbers = np.array([self._number_or_new(name) for name in group], np.int64)
        if len(self._groups) >= _MAX_GROUPS:
            self._groups.clear()
        self._groups[group] = numbers
        return numbers

    def _number_or_new(self, name: str) -> int:
        number = self._numbers.get(name)
        return self._begin(name, secrets.token_bytes(16)) if number is None else number

    def _begin(self, name: str, token: bytes) -> int:
        if not self._free:
            self._make_free()
        number = self._free.pop()
        self.table.clear(number)
        self.table.max_outstanding[number] = UNOPENED_STEPS
        self._names[number], self._tokens[number] = checked_session_id(name), token
        self._numbers[name] = number
        if not self._is_cut:
            self._outgoing.append(self._open(number))
        return number

    def _make_free(self) -> None:
        """Numbers that nothing has any more, or new ones."""
        capacity = self.table.capacity
        if len(self._retired) > capacity // 2:
            self._replay.sweep()
            used = {number for rows in self._arrived for number in rows.numbers.tolist()} | set(self._errors)
            self._free = [number for number in self._retired if number not in used]
            self._retired = [number for number in self._retired if number in used]
        if not self._free:
            larger = max(_FIRST_CAPACITY, 2 * capacity)
            self.table.grow(larger)
            self._names += [""] * (larger - capacity)
            self._tokens += [b""] * (larger - capacity)
            self._free = list(range(larger - 1, capacity - 1, -1))

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            del self._numbers[self._names[number]]
            self._ends.pop(number, None)
            self._resumptions.pop(number, None)
            self._retired.append(number)
        self._groups.clear()

    def _open(self, number: int) -> pb.MultiplexStepsRequest:
        """With a new handle. A session that can be built from its beginning is not asked to be there."""
        table = self.table
        self._reopen_at_s.pop(number, None)
        self._openings.add(number)
        self._bind(number)
        request = pb.MultiplexStepsRequest()
        request.open.handle, request.open.answered_step = self._last_handle, int(table.handed_step[number])
        opening = request.open.open
        opening.CopyFrom(self._opening)
        opening.session_id, opening.resume_token = self._names[number], self._tokens[number]
        was_open, taken_over = bool(table.was_open[number]), bool(table.is_taken_over[number])
        leaving = self._is_leaving or table.is_closing[number] or table.kept_step[number] > 0
        opening.resume = taken_over or bool(was_open and leaving)
        opening.rebuild = was_open and not opening.resume
        opening.take_over = taken_over and not was_open
        return request

    def _open_all(self) -> Requests:
        """On a new call, whose handles begin anew."""
        self._is_cut = False
        self._last_handle = 0
        self._number_of[:] = -1
        self._reopen_at_s.clear()
        self._backlog_at_s = math.inf
        alive = np.array([n for n in self._numbers.values() if n not in self._ends], np.int64)
        self._wait_again(alive)
        return [self._open(number) for number in alive.tolist()]

    def _wait_again(self, numbers: Ints) -> None:
        """All that is kept of these sessions waits to be sent."""
        table = self.table
        again = np.zeros(table.capacity, np.bool_)
        again[numbers] = True
        self._backlog.keep(lambda batch: ~again[batch.numbers])
        table.resets[numbers] = 0
        for batch in self._replay:
            kept = batch.where(again[batch.numbers])
            self._backlog.add(kept)
            if batch.kind == "reset":
                table.count_resets(kept.numbers, 1)

    def _bind(self, number: int) -> None:
        self._last_handle += 1
        if self._last_handle >= len(self._number_of):
            self._number_of = np.concatenate([self._number_of, np.full(len(self._number_of), -1)])
        self._number_of[self._last_handle] = number
        self.table.handle[number] = self._last_handle

    def _unbind(self, numbers: Ints) -> None:
        """What these have outstanding is not answered."""
        table = self.table
        self._owed -= int(table.outstanding[numbers].sum())
        table.outstanding[numbers] = 0
        self._number_of[table.handle[numbers]] = -1
        table.handle[numbers] = 0
        table.is_open[numbers] = table.is_refused[numbers] = False
        self._openings.difference_update(numbers.tolist())

    def _bound(self, handles: Iterable[int]) -> Ints:
        """The sessions of those that are bound to one."""
        numbers = self._number_of[_ints(handles)]
        return numbers[numbers >= 0]

    def _lose(self, numbers: Ints, error: RnnserveError) -> None:
        """These have lost their handles; they are opened again, unless that is hopeless."""
        table = self.table
        was_moved = isinstance(error, SessionMoved) & table.is_open[numbers]  # perhaps by a late open of ours
        self._unbind(numbers)
        over: list[int] = []
        for number, moved in zip(numbers.tolist(), was_moved.tolist(), strict=True):
            if table.is_closing[number] and isinstance(error, SessionNotFound):
                self._gone(number)
            elif not self._reopens(number, error, moved):
                over.append(number)
        self._end(np.array(over, np.int64), error)
        if len(over) < len(numbers):
            self._wait_again(numbers[~table.is_over[numbers]])

    def _reopens(self, number: int, error: RnnserveError, was_moved: bool) -> bool:
        table = self.table
        if not (table.was_open[number] and table.is_parkable[number] and (was_moved or outlives(error))):
            return False
        if number not in self._resumptions:
            self._resumptions[number] = Resumption(self._resume_timeout_s)
            if not was_moved:
                message = f"the session is interrupted and tries to resume: {without_advice(error.message)}"
                self._notices.tell(Notice("interrupted", message, error=error, session=self._names[number]))
        pause_s = self._resumptions[number].pause_s(MOVED_PAUSE_S if was_moved else error.retry_after_s)
        if pause_s is not None:
            self._reopen_at_s[number] = time.monotonic() + pause_s
        return pause_s is not None

    def _end(self, numbers: Ints, error: RnnserveError) -> None:
        """These are over. One that never was open is forgotten, so that its name may be tried again."""
        if not len(numbers):
            return
        table = self.table
        self._drop(numbers)
        for number in numbers.tolist():
            self._ends[number] = error
            self._errors.setdefault(number, error)
        self._forget(numbers[~table.was_open[numbers]].tolist())

    def _gone(self, number: int) -> None:
        """It is closed, and nothing is left of it."""
        self._drop(np.array([number]))
        self._forget([number])

    def _drop(self, numbers: Ints) -> None:
        """Nothing of these is sent any more."""
        table = self.table
        self._unbind(numbers)
        table.is_over[numbers] = True
        table.released_step[numbers] = NEVER + 1
        table.resets[numbers] = 0
        if table.waiting[numbers].any():
            self._backlog.keep(lambda batch: ~table.is_over[batch.numbers])
        for number in numbers.tolist():
            self._reopen_at_s.pop(number, None)

    # Sending

    def _make(self, batch: Batch) -> None:
        """To be sent, now or once it may."""
        table = self.table
        if batch.kind != "close" and (self._errors or self._ends):
            batch = batch.where(~self._has_error(batch.numbers))
        numbers = batch.numbers
        if batch.kind == "reset":
            self._replay.add(batch.where(table.reset_step[numbers] != batch.first_steps))  # two in a row are one
            table.reset_step[numbers] = batch.first_steps
            table.count_resets(numbers, 1)
        else:
            self._replay.add(batch)
            table.next_step[numbers] += batch.kind == "steps"
        now = table.may_send(numbers) & (table.waiting[numbers] == 0)
        if now.all():
            table.outstanding[numbers] += 1
            self._send(batch)
        else:
            self._backlog.add(batch)
            self._send_waiting()

    def _has_error(self, numbers: Ints) -> Mask:
        failed = np.zeros(self.table.capacity, np.bool_)
        failed[[*self._errors, *self._ends]] = True
        found: Mask = failed[numbers]
        return found

    def _send_waiting(self) -> None:
        self._backlog_at_s = math.inf
        for batch in self._backlog.take():
            self._send(batch)

    def _send(self, batch: Batch) -> None:
        """They count as outstanding already."""
        numbers, table = batch.numbers, self.table
        self._owed += len(batch)
        if batch.kind == "steps":
            table.sent_step[numbers] = np.maximum(table.sent_step[numbers], batch.first_steps + 1)
            self._outgoing += map(self._steps_request, self._parts(batch))
        else:
            handles, acknowledged = table.handle[numbers].tolist(), table.handed_step[numbers].tolist()
            make = _reset_request if batch.kind == "reset" else _close_request
            self._outgoing += map(make, handles, batch.first_steps.tolist(), acknowledged)

    def _parts(self, batch: Batch) -> list[Batch]:
        """As the server takes them: of one version of the model, and not too large."""
        if not len(batch):
            return []
        versions = self.table.version[batch.numbers]
        alike = [batch.rows(versions == v) for v in np.unique(versions)] if len(self._versions) > 1 else [batch]
        row_bytes = batch.inputs.nbytes // len(batch) + _ROW_BYTES
        rows = max(1, min(self._max_rows, (self._max_message_bytes - _MESSAGE_BYTES) // row_bytes))
        return [part.rows(slice(i, i + rows)) for part in alike for i in range(0, len(part), rows)]

    def _steps_request(self, batch: Batch) -> pb.MultiplexStepsRequest:
        request, table = pb.MultiplexStepsRequest(), self.table
        steps = request.steps
        steps.handles.extend(table.handle[batch.numbers].tolist())
        steps.first_steps.extend(batch.first_steps.tolist())
        steps.answered_steps.extend(table.handed_step[batch.numbers].tolist())
        inputs = batch.inputs
        if inputs.dtype == np.uint32:
            steps.text = inputs.astype("<u4").tobytes().decode("utf-32-le")
        else:
            data = inputs.astype("<f4", copy=False).tobytes()
            steps.tensor.CopyFrom(Tensor(data_type=DATA_TYPE_FLOAT32, shape=inputs.shape, data=data))
        return request

    def _turn(self) -> Turn[pb.MultiplexStepsRequest, None]:
        if self._backlog and (self._backlog_at_s == math.inf or self._backlog_at_s <= time.monotonic()):
            self._send_waiting()
        return Turn(self.outgoing())

    # Reading

    def _answered(self, answer: pb.StepBatchAnswer) -> None:
        table = self.table
        numbers, durable = self._number_of[_ints(answer.handles)], _ints(answer.durable_steps)
        rows = rows_from(numbers, _ints(answer.first_steps), answer.prediction)
        bound = numbers >= 0
        if not bound.all():
            rows = rows.at(np.flatnonzero(rows.numbers >= 0))
            numbers, durable = numbers[bound], durable[bound]
        self._respond(numbers)
        self._advance_durable(numbers, durable)
        self._collect(rows)
        table.release(numbers)
        self._replay.prune()

    def _respond(self, numbers: Ints) -> None:
        """The server owes one response less to each."""
        table = self.table
        np.subtract.at(table.outstanding, numbers, 1)
        self._owed -= len(numbers)
        table.is_refused[numbers] &= table.outstanding[numbers] > 0
        self._resumption.progress()
        if self._resumptions:
            for number in self._resumptions.keys() & set(numbers.tolist()):
                del self._resumptions[number]

    def _collect(self, rows: AnsweredRows) -> None:
        """Those that are new. Raises nothing: a session of which one is missing is over."""
        table = self.table
        expected = table.answered_step[rows.numbers]
        is_next = rows.steps == expected
        if not is_next.all():
            for number in rows.numbers[rows.steps > expected].tolist():
                self._end_where_left_out(number)
            rows = rows.at(np.flatnonzero(is_next))
        if len(rows):
            table.answered_step[rows.numbers] = rows.steps + 1
            self._arrived.append(rows)
            self._like = rows

    def _end_where_left_out(self, number: int) -> None:
        answered_step = int(self.table.answered_step[number])
        lost = resume_point_lost(f"the server left out the answers from step {answered_step} on")
        self._end(np.array([number]), lost)

    def _opened(self, message: pb.HandleOpened) -> None:
        number = int(self._number_of[message.handle])
        if number < 0:
            return
        table, opened = self.table, message.opened
        self._openings.discard(number)
        self._note_limits(opened)
        table.is_open[number] = True
        table.max_outstanding[number] = max(1, message.max_outstanding_steps)
        table.version[number] = opened.version
        if not table.was_open[number]:
            self._begin_at(number, opened.next_step)
        table.is_parkable[number] = opened.durability in (pb.DURABILITY_PROCESS, pb.DURABILITY_STORED)
        table.is_stored[number] |= opened.durability == pb.DURABILITY_STORED  # once stored, an outage ends nothing
        table.is_stored[number] &= table.is_parkable[number]
        table.applied_step[number] = opened.next_step
        for missed in message.missed:
            self._collect_missed(number, missed)
        numbers = np.array([number])
        self._advance_durable(numbers, np.array([message.durable_step]))
        table.release(numbers)
        lost = self._what_is_lost(number, opened.next_step)
        if lost is not None:
            self._end(numbers, lost)
            return
        self._resume(number, opened.next_step)
        if self._openings and self._backlog_at_s == math.inf:
            self._backlog_at_s = time.monotonic() + OPENINGS_PAUSE_S
        elif not self._openings:
            self._backlog_at_s = math.inf

    def _note_limits(self, opened: pb.SessionOpened) -> None:
        self._was_open = True
        self._versions.add(opened.version)
        self._max_rows = max(1, opened.max_steps_per_message)
        self._max_message_bytes = opened.max_message_bytes or self._max_message_bytes

    def _begin_at(self, number: int, index: int) -> None:
        """The first time: a new session, or one taken over from another stream."""
        table = self.table
        table.was_open[number] = True
        if table.is_taken_over[number] and index > table.answered_step[number]:
            table.next_step[number] = table.sent_step[number] = table.kept_step[number] = index

    def _collect_missed(self, number: int, missed: pb.StepsAnswer) -> None:
        count = len(missed.prediction.outputs.shape) and missed.prediction.outputs.shape[0]
        steps = np.arange(missed.first_step, missed.first_step + count)
        rows = rows_from(np.full(count, number), steps, missed.prediction)
        answered_step = int(self.table.answered_step[number])
        if count and steps[0] <= answered_step <= steps[-1]:
            rows = rows.at(np.arange(answered_step - int(steps[0]), count))
            self.table.answered_step[number] = missed.first_step + count
            self._arrived.append(rows)
            self._like = rows

    def _what_is_lost(self, number: int, index: int) -> RnnserveError | None:
        table = self.table
        sent_step, answered_step = int(table.sent_step[number]), int(table.answered_step[number])
        if index > sent_step:
            return resume_point_lost(f"the server expects step {index}, but only {sent_step} were sent")
        if index > answered_step:
            return resume_point_lost(f"the server left out the answers from step {answered_step} on")
        if index < table.next_step[number] and index < table.kept_step[number]:
            lost = f"the server has lost the steps from {index} on, which are no longer kept here"
            return resume_point_lost(lost, expected_step=index)
        return None

    def _resume(self, number: int, index: int) -> None:
        """Said of a session that was interrupted alone, and of the call once all of it goes on."""
        self._resumption.progress()
        if number in self._resumptions and not self._is_interrupted:
            message = f"the session goes on with step {index}"
            self._notices.tell(Notice("resumed", message, step=index, session=self._names[number]))
        if self._is_interrupted and not self._openings:
            self._is_interrupted = False
            self._notices.tell(Notice("resumed", "the call goes on with all its sessions"))

    def _refused(self, message: pb.HandlesRefused) -> None:
        error = error_from_status(message.error)
        if not message.handles:  # what was sent is no message to the server
            self.failure = self.failure or error
            return
        numbers, first_steps = self._number_of[_ints(message.handles)], _ints(message.first_steps)
        bound = numbers >= 0
        numbers, first_steps = numbers[bound], first_steps[bound]
        new = ~self.table.is_refused[numbers]
        self._respond(numbers)
        firsts, places = np.unique(numbers[new], return_index=True)
        self._refuse(firsts, first_steps[new][places], error)

    def _refuse(self, numbers: Ints, first_steps: Ints, error: RnnserveError) -> None:
        """What was refused is for the caller to decide, so it is not sent again; nor is what was sent behind it."""
        table = self.table
        again = first_steps < table.answered_step[numbers]
        if again.any():
            self._lose(numbers[again], error if isinstance(error, TryAgain) else refused_again(error))
            numbers, first_steps = numbers[~again], first_steps[~again]
        from_step = np.full(table.capacity, NEVER)
        from_step[numbers] = first_steps
        self._replay.drop_refused(from_step)
        if table.waiting[numbers].any():
            self._backlog.keep(lambda batch: ~is_refused(batch, table, from_step))
        table.reset_step[numbers[(table.resets[numbers] > 0) & (table.reset_step[numbers] >= first_steps)]] = -1
        table.next_step[numbers] = table.sent_step[numbers] = first_steps
        table.is_refused[numbers] = table.outstanding[numbers] > 0
        table.is_closing[numbers] = False
        table.resets[numbers] = 0
        for number in numbers.tolist():
            self._errors.setdefault(number, error)

    def _was_reset(self, message: pb.HandleReset) -> None:
        numbers = self._bound([message.handle])
        self._respond(numbers)
        self.table.count_resets(numbers, -1)
        self._advance_durable(numbers, np.full(len(numbers), message.durable_step))

    def _closed(self, message: pb.HandleClosed) -> None:
        for number in self._bound([message.handle]).tolist():
            if self.table.is_parkable[number] and not message.closed.erased:
                self._tell_not_erased(self._names[number])
            self._resumption.progress()
            self._gone(number)

    def _tell_not_erased(self, name: str) -> None:
        message = "the server has not said that the session is erased; it may stay parked for its resume window"
        self._notices.tell(Notice("not_erased", message, session=name))

    def _became_durable(self, message: pb.HandlesDurable) -> None:
        numbers, durable = self._number_of[_ints(message.handles)], _ints(message.durable_steps)
        bound = numbers >= 0
        numbers = numbers[bound]
        self._advance_durable(numbers, durable[bound])
        self.table.release(numbers)
        self._replay.prune()

    def _advance_durable(self, numbers: Ints, durable: Ints) -> None:
        """Where more is durable, the store works."""
        table = self.table
        more = durable > table.durable_step[numbers]
        if more.any():
            table.durable_step[numbers] = np.maximum(table.durable_step[numbers], durable)
            table.is_stored[numbers] |= more & table.is_parkable[numbers]

    def _resumes_after(self, error: RnnserveError) -> bool:
        if self._was_open:
            return outlives(error)
        self._open_attempts -= 1
        again = isinstance(error, Unreachable) or (isinstance(error, TimedOut) and self._other_connections)
        return again and self._open_attempts > 0

    # What the caller gets

    def _rows_of(self, numbers: Ints, first_steps: Ints) -> AnsweredRows:
        """The answers to these steps that have come, in their order; rows without an answer for the others."""
        if len(self._arrived) == 1 and np.array_equal(self._arrived[0].numbers, numbers):
            rows = self._arrived[0]
            if np.array_equal(rows.steps, first_steps):
                self._arrived = []
                return rows
        place_of = np.full(self.table.capacity, -1)
        place_of[numbers] = np.arange(len(numbers))
        wanted_step = np.full(self.table.capacity, -1)
        wanted_step[numbers] = first_steps
        found, left = list[AnsweredRows](), list[AnsweredRows]()
        for rows in self._arrived:
            wanted = wanted_step[rows.numbers] == rows.steps
            found.append(rows.at(np.flatnonzero(wanted)))
            left.append(rows.at(np.flatnonzero(~wanted)))
        self._arrived = [rows for rows in left if len(rows)]
        has_answer = np.zeros(len(numbers), np.bool_)
        for rows in found:
            has_answer[place_of[rows.numbers]] = True
        together = joined([*found, self._like.missing(numbers[~has_answer])])
        return together.at(np.argsort(place_of[together.numbers]))

    def _hand_over(self, rows: AnsweredRows) -> None:
        """The caller has got these; what it has not got yet of the same sessions is not acknowledged."""
        handed_step = self.table.handed_step
        answered = rows.steps >= 0
        numbers, ends = rows.numbers[answered], rows.steps[answered] + 1
        handed_step[numbers] = np.maximum(handed_step[numbers], ends)  # of a session that is there twice, the last
        for left in self._arrived:
            handed_step[left.numbers] = np.minimum(handed_step[left.numbers], left.steps)

    def _taken_errors(self, numbers: Ints) -> dict[str, RnnserveError]:
        errors: dict[str, RnnserveError] = {}
        for number in numbers.tolist():
            error = self._errors.pop(number, None) or self._ends.get(number)
            if error is not None:
                errors[self._names[number]] = error
        return errors


def _ints(values: Iterable[int]) -> Ints:
    return np.array(list(values), np.int64)


def _reset_request(handle: int, first_step: int, answered_step: int) -> pb.MultiplexStepsRequest:
    reset = pb.ResetHandle(handle=handle, reset=pb.ResetSession(first_step=first_step), answered_step=answered_step)
    return pb.MultiplexStepsRequest(reset=reset)


def _close_request(handle: int, first_step: int, answered_step: int) -> pb.MultiplexStepsRequest:
    close = pb.CloseHandle(handle=handle, close=pb.CloseSession(first_step=first_step), answered_step=answered_step)
    return pb.MultiplexStepsRequest(close=close)
