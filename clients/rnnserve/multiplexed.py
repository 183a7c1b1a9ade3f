"""The bookkeeping of many sessions on one call, without I/O: what `Session` does for one, done for all of a batch.

Whatever is per session here happens only when it begins, ends or goes on; steps and their answers are arrays.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rnnserve.answered_rows import AnsweredRows, Arrivals, rows_from
from rnnserve.batch_requests import BatchRequests
from rnnserve.batches import Backlog, Batch, BatchReplay, Inputs, bare, is_refused
from rnnserve.errors import RnnserveError, SessionMoved, SessionNotFound, TimedOut, TryAgain, Unreachable
from rnnserve.exchange import Turn
from rnnserve.handles import Handles, ints
from rnnserve.notices import Notices
from rnnserve.replay import REPLAY_BUFFER_BYTES, WhenReplayFull
from rnnserve.requests import checked_version
from rnnserve.results import BatchAnswer, Notice, ResumePoint, notice_from
from rnnserve.retry import Resumption
from rnnserve.session import (
    MOVED_PAUSE_S,
    RESUME_TIMEOUT_S,
    Durability,
    outlives,
    refused_again,
    resume_point_lost,
    resume_token,
    without_advice,
)
from rnnserve.session_names import SessionNames
from rnnserve.session_table import NEVER, Ints, Mask, SessionTable
from rnnserve.statuses import error_from_status
from rnnserve.v1 import real_time_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import OutputOptions

_Requests = list[pb.MultiplexStepsRequest]
_Turn = Turn[pb.MultiplexStepsRequest, None]

UNOPENED_STEPS = 8  # of a session that is being opened wait here at most
OPENINGS_PAUSE_S = 0.002  # for more sessions to be open before what waits for them is sent


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
        self._names = SessionNames(self.table, self._used_numbers)
        self._handles = Handles(self.table)
        self._replay = BatchReplay(self.table, replay_buffer_bytes, when_replay_full)
        self._backlog = Backlog(self.table)
        self._backlog_at_s = 0.0  # not before
        self._requests = BatchRequests(self.table)
        self._outgoing: _Requests = []
        self._owed = 0  # responses
        self._arrivals = Arrivals(self.table)
        self._errors: dict[int, RnnserveError] = {}  # which the caller has not taken
        self._ends: dict[int, RnnserveError] = {}  # why sessions are over
        self._notices = Notices(on_notice)
        self._to_open: list[int] = []
        self._openings: set[int] = set()  # under way
        self._reopen_at_s: dict[int, float] = {}
        self._resume_timeout_s = resume_timeout_s
        self._resumption = Resumption(resume_timeout_s)
        self._resumptions: dict[int, Resumption] = {}  # of sessions that were lost alone
        self._open_attempts = open_attempts  # left before the first session is open
        self._other_connections = other_connections  # on which a server may answer where one is stuck
        self._was_open = False
        self._is_cut = False
        self._is_interrupted = False
        self._is_leaving = False

    @property
    def notices(self) -> list[Notice]:
        """All so far."""
        return self._notices.told

    @property
    def names(self) -> list[str]:
        """Of the sessions that are not over."""
        return list(map(self._names.name, self._alive.tolist()))

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
        return bool(self._arrivals) or bool(self._errors)

    @property
    def wake_after_s(self) -> float | None:
        """When `wake` has something to do."""
        times_s = [*self._reopen_at_s.values(), *([self._backlog_at_s] if self._backlog_at_s else [])]
        return max(0.0, min(times_s) - time.monotonic()) if times_s else None

    # Sessions by name

    def numbers(self, names: Sequence[str]) -> Ints:
        """Of sessions, which begin if they are not known yet. Raises TypeError, ValueError, FieldInvalid."""
        return self._names.group(names, lambda name: self._begin(name, secrets.token_bytes(16)))

    def known(self, names: Iterable[str]) -> Ints:
        """The numbers of those that have begun."""
        return self._names.known(names)

    def number(self, name: str) -> int:
        """Of one that has begun. Raises SessionNotFound."""
        return self._names.number(name)

    def forget(self, numbers: Ints) -> None:
        """The names of those that are over may begin anew."""
        self._forget([number for number in numbers.tolist() if number in self._ends])

    def resume(self, point: ResumePoint) -> None:
        """A session that another stream had. Raises ValueError if it is known already."""
        if point.session in self._names:
            raise ValueError(f"{point.session!r} is open on this call already")
        number, table = self._begin(point.session, resume_token(point.token)), self.table
        for steps in (
            table.next_step, table.sent_step, table.answered_step, table.handed_step, table.taken_step, table.kept_step
        ):  # fmt: skip
            steps[number] = point.answered_step
        table.is_taken_over[number] = True
        if point.reset:
            self.reset(np.array([number]))

    def resume_point(self, name: str) -> ResumePoint:
        """Where a session stands, for another stream to go on. Raises SessionNotFound."""
        number, table = self.number(name), self.table
        handed_step = int(table.handed_step[number])
        was_reset = 0 < table.reset_step[number] == handed_step and not table.resets[number]
        return ResumePoint(name, self._names.token(number).hex(), handed_step, bool(was_reset))

    def durability(self, name: str) -> Durability:
        """What a session survives. Raises SessionNotFound."""
        number, table = self.number(name), self.table
        if not table.is_parkable[number]:
            return "none"
        return "stored" if table.is_stored[number] else "process"

    # What the caller wants

    def begin(self) -> _Turn:
        """What comes before anything else: a new call where the last one was given up."""
        if self._is_cut and self.failure is None:
            return Turn(requests=self._open_all(), reconnect_after_s=0.0)
        return self._turn()

    def steps(self, numbers: Ints, inputs: Inputs) -> None:
        """The next step of each; none of those that have an error."""
        self._make(Batch("steps", numbers, self.table.next_step[numbers], inputs))

    def reset(self, numbers: Ints) -> None:
        """Back to the initial state; not of those that have an error."""
        self._make(bare("reset", numbers, self.table.next_step[numbers]))

    def close(self, numbers: Ints) -> None:
        """Ends these sessions."""
        numbers = numbers[~self.table.is_over[numbers] & ~self.table.is_closing[numbers]]
        self.table.is_closing[numbers] = True
        self._make(bare("close", numbers, self.table.next_step[numbers]))

    def limit_closing(self, timeout_s: float) -> None:
        """From now on nothing is resumed for longer than this, and no session begun anew."""
        self._is_leaving = True
        for resumption in (self._resumption, *self._resumptions.values()):
            resumption.limit(timeout_s)

    def closed(self) -> None:
        """The last use: the caller is told of each session of which the server did not say that nothing is left."""
        for number in self._alive[self.table.is_parkable[self._alive]].tolist():
            self._tell_not_erased(number)

    def outgoing(self) -> _Requests:
        """What is to be sent now."""
        opening, self._to_open = self._to_open, []
        requests = [*map(self._open, opening), *self._outgoing]
        self._outgoing = []
        return requests

    def take(self) -> BatchAnswer | None:
        """All that has come, and the errors; None = nothing."""
        if not self.has_news:
            return None
        rows = self._arrivals.take_all(np.array(list(self._errors), np.int64))
        names = list(map(self._names.name, rows.numbers.tolist()))
        return rows.answer(names, self._take_errors(list(self._errors)))

    def take_steps(self, names: Sequence[str], numbers: Ints, first_steps: Ints) -> BatchAnswer:
        """The answers that these steps have brought, in their order, and the errors of those that have none."""
        about = first_steps - self.table.look_ahead[numbers]
        rows = self._arrivals.take(numbers, np.where(about >= self.table.reset_step[numbers], about, -1))
        return rows.answer(names, self._take_errors(numbers[rows.steps < 0].tolist()))

    def take_all_of(self, names: Sequence[str]) -> BatchAnswer:
        """All that has come of these sessions."""
        rows = self._arrivals.take_all_of(self._names.known(names))
        return rows.answer(list(map(self._names.name, rows.numbers.tolist())), {})

    def take_error(self, numbers: Ints) -> RnnserveError | None:
        """The first error of these sessions; the others stay."""
        for number in numbers.tolist():
            for error in self._take_errors([number]).values():
                return error
        return None

    # What happens

    def handle(self, response: pb.MultiplexStepsResponse) -> _Turn:
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
                self._ended(response.ended)
            case "durable":
                self._became_durable(response.durable)
            case "notice":
                self._notices.tell(notice_from(response.notice))
        return self._turn()

    def wake(self) -> _Turn:
        """Does what it is time for."""
        now_s = time.monotonic()
        self._to_open += [number for number, at_s in self._reopen_at_s.items() if at_s <= now_s]
        return self._turn()

    def cut(self, error: RnnserveError) -> _Turn:
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

    # Sessions begin

    @property
    def _alive(self) -> Ints:
        numbers = self._names.numbers
        alive: Ints = numbers[~self.table.is_over[numbers]]
        return alive

    def _used_numbers(self) -> set[int]:
        self._replay.sweep()
        return self._arrivals.numbers | set(self._errors)

    def _begin(self, name: str, token: bytes) -> int:
        number = self._names.add(name, token)
        self.table.max_outstanding[number] = UNOPENED_STEPS
        self._to_open.append(number)
        return number

    def _open(self, number: int) -> pb.MultiplexStepsRequest:
        """With a new handle. A session that can be built from its beginning is not asked to be there."""
        table = self.table
        self._reopen_at_s.pop(number, None)
        self._openings.add(number)
        request = pb.MultiplexStepsRequest()
        request.open.handle, request.open.answered_step = self._handles.bind(number), int(table.handed_step[number])
        opening = request.open.open
        opening.CopyFrom(self._opening)
        opening.session_id, opening.resume_token = self._names.name(number), self._names.token(number)
        was_open, is_taken_over = bool(table.was_open[number]), bool(table.is_taken_over[number])
        must_be_there = self._is_leaving or bool(table.is_closing[number]) or bool(table.kept_step[number])
        opening.resume = is_taken_over or (was_open and must_be_there)
        opening.rebuild = was_open and not opening.resume
        opening.take_over = is_taken_over and not was_open
        return request

    def _open_all(self) -> _Requests:
        """On a new call."""
        self._is_cut = False
        self._handles.begin_call()
        self._reopen_at_s.clear()
        self._outgoing.clear()
        alive = self._alive
        self._make_wait_again(alive)
        self._to_open = alive.tolist()
        return self.outgoing()

    def _make_wait_again(self, numbers: Ints) -> None:
        """All that is kept of these sessions waits to be sent."""
        if not len(numbers):
            return
        table = self.table
        is_again = np.zeros(table.capacity, np.bool_)
        is_again[numbers] = True
        self._backlog.keep(lambda batch: ~is_again[batch.numbers])
        table.resets[numbers] = 0
        for batch in self._replay:
            kept = batch.where(is_again[batch.numbers])
            self._backlog.add(kept)
            if batch.kind == "reset":
                table.count_resets(kept.numbers, 1)

    def _opened(self, message: pb.HandleOpened) -> None:
        number = int(self._handles.numbers([message.handle])[0])
        if number < 0:
            return
        index = message.opened.next_step
        self._openings.discard(number)
        self._requests.note(message.opened)
        self._fill_in(number, message)
        for missed in message.missed:
            self._collect_rows(number, missed)
        self.table.taken_step[number] = max(self.table.taken_step[number], index)
        self._advance_durable(np.array([number]), np.array([message.durable_step]))
        lost = self._what_is_lost(number, index, index - message.opened.pending_answers)
        if lost is not None:
            self._end(np.array([number]), lost)
            return
        self._announce_resumed(number, index)
        if not self._openings:
            self._backlog_at_s = 0.0
        elif not self._backlog_at_s:
            self._backlog_at_s = time.monotonic() + OPENINGS_PAUSE_S

    def _fill_in(self, number: int, message: pb.HandleOpened) -> None:
        table, opened = self.table, message.opened
        is_first, index = not table.was_open[number], opened.next_step
        table.look_ahead[number] = opened.look_ahead
        if is_first and table.is_taken_over[number] and index > table.answered_step[number]:
            table.next_step[number] = table.sent_step[number] = table.kept_step[number] = index
        self._was_open = table.was_open[number] = table.is_open[number] = True
        table.max_outstanding[number] = max(1, message.max_outstanding_steps)
        table.version[number] = opened.version
        table.applied_step[number] = index
        is_parkable = opened.durability in (pb.DURABILITY_PROCESS, pb.DURABILITY_STORED)
        is_stored = opened.durability == pb.DURABILITY_STORED or table.is_stored[number]
        table.is_parkable[number] = is_parkable
        table.is_stored[number] = is_parkable and is_stored  # once stored, an outage of the store ends nothing

    def _collect_rows(self, number: int, answer: pb.StepsAnswer) -> None:
        """Those about several steps of one session, as far as they are new."""
        count = answer.next_step - answer.first_step  # at least
        steps = np.arange(answer.first_step, answer.next_step)
        rows = rows_from(np.full(count, number), steps, answer.prediction)
        for place in range(len(rows)):
            self._collect(rows.at(np.array([place])))

    def _what_is_lost(self, number: int, index: int, next_answer: int) -> RnnserveError | None:
        table = self.table
        sent_step, answered_step = int(table.sent_step[number]), int(table.answered_step[number])
        if index > sent_step:
            return resume_point_lost(f"the server expects step {index}, but only {sent_step} were sent")
        if next_answer > answered_step:
            return resume_point_lost(f"the server left out the answers from step {answered_step} on")
        if index < min(table.next_step[number], table.kept_step[number]):
            lost = f"the server has lost the steps from {index} on, which are no longer kept here"
            return resume_point_lost(lost, expected_step=index)
        return None

    def _announce_resumed(self, number: int, index: int) -> None:
        """Of a session that was interrupted alone, and of the call once all of it goes on."""
        self._resumption.progress()
        if number in self._resumptions and not self._is_interrupted:
            message = f"the session goes on with step {index}"
            self._notices.tell(Notice("resumed", message, step=index, session=self._names.name(number)))
        if self._is_interrupted and not self._openings:
            self._is_interrupted = False
            self._notices.tell(Notice("resumed", "the call goes on with all its sessions"))

    # Sessions end

    def _ended(self, message: pb.HandlesEnded) -> None:
        numbers = self._handles.numbers(message.handles)
        self._lose(numbers[numbers >= 0], error_from_status(message.error))

    def _lose(self, numbers: Ints, error: RnnserveError) -> None:
        """These have lost their handles; they are opened again, unless that is hopeless."""
        table = self.table
        were_open = table.is_open[numbers].tolist()
        self._unbind(numbers)
        for number, was_open in zip(numbers.tolist(), were_open, strict=True):
            if table.is_closing[number] and isinstance(error, SessionNotFound):
                self._drop(np.array([number]))
                self._forget([number])
            elif not self._reopens(number, error, was_open):
                self._end(np.array([number]), error)
        self._make_wait_again(numbers[~table.is_over[numbers]])

    def _reopens(self, number: int, error: RnnserveError, was_open: bool) -> bool:
        was_moved = isinstance(error, SessionMoved) and was_open  # perhaps by an open of ours that came late
        is_kept = self.table.was_open[number] and self.table.is_parkable[number]
        if not (is_kept and (was_moved or outlives(error))):
            return False
        if number not in self._resumptions:
            self._resumptions[number] = Resumption(self._resume_timeout_s)
            message = f"the session is interrupted and tries to resume: {without_advice(error.message)}"
            self._notices.tell(Notice("interrupted", message, error=error, session=self._names.name(number)))
        pause_s = self._resumptions[number].pause_s(MOVED_PAUSE_S if was_moved else error.retry_after_s)
        if pause_s is not None:
            self._reopen_at_s[number] = time.monotonic() + pause_s
        return pause_s is not None

    def _end(self, numbers: Ints, error: RnnserveError) -> None:
        """These are over. One that never was open is forgotten, so that its name may be tried again."""
        self._drop(numbers)
        for number in numbers.tolist():
            self._ends[number] = error
            self._errors.setdefault(number, error)
        self._forget(numbers[~self.table.was_open[numbers]].tolist())

    def _drop(self, numbers: Ints) -> None:
        """Nothing of these is sent any more."""
        table = self.table
        self._unbind(numbers)
        table.is_over[numbers] = True
        table.released_step[numbers] = NEVER
        table.resets[numbers] = 0
        if table.waiting[numbers].any():
            self._backlog.keep(lambda batch: ~table.is_over[batch.numbers])

    def _unbind(self, numbers: Ints) -> None:
        """What these have outstanding is not answered."""
        table = self.table
        self._owed -= int(table.outstanding[numbers].sum())
        table.outstanding[numbers] = 0
        table.is_open[numbers] = table.is_refused[numbers] = False
        self._handles.unbind(numbers)
        self._openings.difference_update(numbers.tolist())

    def _forget(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            for known in (self._ends, self._resumptions, self._reopen_at_s):
                known.pop(number, None)
        if numbers:
            self._names.forget(numbers)

    def _closed(self, message: pb.HandleClosed) -> None:
        numbers = self._handles.numbers([message.handle])
        for number in numbers[numbers >= 0].tolist():
            self._resumption.progress()
            if self.table.is_parkable[number] and not message.closed.erased:
                self._tell_not_erased(number)
            self._drop(np.array([number]))
            self._forget([number])

    def _tell_not_erased(self, number: int) -> None:
        message = "the server has not said that the session is erased; it may stay parked for its resume window"
        self._notices.tell(Notice("not_erased", message, session=self._names.name(number)))

    def _resumes_after(self, error: RnnserveError) -> bool:
        if self._was_open:
            return outlives(error)
        self._open_attempts -= 1
        again = isinstance(error, Unreachable) or (isinstance(error, TimedOut) and self._other_connections)
        return again and self._open_attempts > 0

    # Requests

    def _make(self, batch: Batch) -> None:
        """To be sent, now or once it may."""
        table = self.table
        if batch.kind != "close" and (self._errors or self._ends):
            batch = batch.where(~self._have_error(batch.numbers))
        numbers = batch.numbers
        if batch.kind == "reset":
            self._replay.add(batch.where(table.reset_step[numbers] != batch.first_steps))  # two in a row are one
            table.reset_step[numbers] = batch.first_steps
            table.count_resets(numbers, 1)
        else:
            self._replay.add(batch)
            table.next_step[numbers] += batch.kind == "steps"
        if (table.may_send(numbers) & (table.waiting[numbers] == 0)).all():
            table.outstanding[numbers] += 1
            self._send(batch)
        else:
            self._backlog.add(batch)
            self._send_waiting()

    def _have_error(self, numbers: Ints) -> Mask:
        failed = np.zeros(self.table.capacity, np.bool_)
        failed[[*self._errors, *self._ends]] = True
        found: Mask = failed[numbers]
        return found

    def _send(self, batch: Batch) -> None:
        """They count as outstanding already."""
        table, numbers = self.table, batch.numbers
        self._owed += len(batch)
        if batch.kind == "steps":
            table.sent_step[numbers] = np.maximum(table.sent_step[numbers], batch.first_steps + 1)
        self._outgoing += self._requests.of(batch)

    def _send_waiting(self) -> None:
        self._backlog_at_s = 0.0
        for batch in self._backlog.take() if self._backlog else []:
            self._send(batch)

    def _turn(self) -> _Turn:
        if self._backlog_at_s <= time.monotonic():
            self._send_waiting()
        return Turn(self.outgoing())

    # Responses

    def _answered(self, answer: pb.StepBatchAnswer) -> None:
        numbers, durable = self._handles.numbers(answer.handles), ints(answer.durable_steps)
        steps = ints(answer.first_steps)
        rows = rows_from(numbers, steps, answer.prediction)
        is_bound = numbers >= 0
        if not is_bound.all():
            rows = rows.at(np.flatnonzero(rows.numbers >= 0))
            numbers, durable, steps = numbers[is_bound], durable[is_bound], steps[is_bound]
        self._responded(numbers)
        self._take(numbers, steps + self.table.look_ahead[numbers] if len(rows) else steps)
        self._collect(rows)
        self._advance_durable(numbers, durable)

    def _take(self, numbers: Ints, steps: Ints) -> None:
        """The server has taken these steps."""
        table = self.table
        table.taken_step[numbers] = np.maximum(table.taken_step[numbers], steps + 1)

    def _responded(self, numbers: Ints) -> None:
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
        """Those that are new. A session of which one is missing is over."""
        expected = self.table.answered_step[rows.numbers]
        if not np.array_equal(rows.steps, expected):
            for place in np.flatnonzero(rows.steps > expected):
                lost = resume_point_lost(f"the server left out the answers from step {expected[place]} on")
                self._end(rows.numbers[[place]], lost)
            rows = rows.at(np.flatnonzero(rows.steps == expected))
        self._arrivals.add(rows)

    def _refused(self, message: pb.HandlesRefused) -> None:
        error = error_from_status(message.error)
        if not message.handles:  # what was sent is no message to the server
            self.failure = self.failure or error
            return
        numbers, first_steps = self._handles.numbers(message.handles), ints(message.first_steps)
        is_bound = numbers >= 0
        numbers, first_steps = numbers[is_bound], first_steps[is_bound]
        is_first = ~self.table.is_refused[numbers]
        self._responded(numbers)
        numbers, places = np.unique(numbers[is_first], return_index=True)
        first_steps = first_steps[is_first][places]
        is_again = first_steps < self.table.taken_step[numbers]
        self._refuse(numbers[~is_again], first_steps[~is_again], error)
        self._lose(numbers[is_again], error if isinstance(error, TryAgain) else refused_again(error))

    def _refuse(self, numbers: Ints, first_steps: Ints, error: RnnserveError) -> None:
        """What was refused is for the caller to decide, so it is not sent again; nor is what was sent behind it."""
        table = self.table
        from_step = np.full(table.capacity, NEVER)
        from_step[numbers] = first_steps
        self._replay.drop_refused(from_step)
        if table.waiting[numbers].any():
            self._backlog.keep(lambda batch: ~is_refused(batch, table, from_step))
        is_reset_refused = (table.resets[numbers] > 0) & (table.reset_step[numbers] >= first_steps)
        table.reset_step[numbers[is_reset_refused]] = -1
        table.resets[numbers] = 0
        table.next_step[numbers] = table.sent_step[numbers] = first_steps
        table.is_refused[numbers] = table.outstanding[numbers] > 0
        table.is_closing[numbers] = False
        for number in numbers.tolist():
            self._errors.setdefault(number, error)

    def _was_reset(self, message: pb.HandleReset) -> None:
        numbers = self._handles.numbers([message.handle])
        numbers = numbers[numbers >= 0]
        self._responded(numbers)
        self.table.count_resets(numbers, -1)
        if message.HasField("last"):
            for number in numbers.tolist():
                self._collect_rows(number, message.last)
        self._advance_durable(numbers, np.full(len(numbers), message.durable_step))

    def _became_durable(self, message: pb.HandlesDurable) -> None:
        numbers, durable = self._handles.numbers(message.handles), ints(message.durable_steps)
        is_bound = numbers >= 0
        self._advance_durable(numbers[is_bound], durable[is_bound])

    def _advance_durable(self, numbers: Ints, durable: Ints) -> None:
        """Where more is durable, the store works."""
        table = self.table
        is_more = durable > table.durable_step[numbers]
        if is_more.any():
            table.durable_step[numbers] = np.maximum(table.durable_step[numbers], durable)
            table.is_stored[numbers] |= is_more & table.is_parkable[numbers]
        table.release(numbers)
        self._replay.prune()

    # What the caller gets

    def _take_errors(self, numbers: Iterable[int]) -> dict[str, RnnserveError]:
        errors: dict[str, RnnserveError] = {}
        for number in numbers:
            error = self._errors.pop(number, None) or self._ends.get(number)
            if error is not None:
                errors[self._names.name(number)] = error
        return errors
