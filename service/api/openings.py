"""How a stream gets a session: from `open` to what is told of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

from models.manifest import Manifest
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.real_time_service_pb2 import (
    DURABILITY_NONE,
    DURABILITY_PROCESS,
    DURABILITY_STORED,
    Durability,
    OpenSession,
    SessionOpened,
    StepsAnswer,
)
from service.api import codec
from service.api.identities import check_session_id, check_token
from service.api.limits import Limits
from service.api.statuses import duration
from service.catalog.catalog import Catalog
from service.errors import FieldInvalid
from service.sessions.record import ANONYMOUS, HeldAnswer, SessionKey
from service.sessions.registry import Opening, SessionRegistry
from service.sessions.session import AppliedSteps, Owner, Session

MAX_CALLER_ID_BYTES = 16


@lru_cache
def _options(encoded: bytes) -> OutputOptions:
    """One object for all that want the same: those of a message would keep all of it in memory."""
    return OutputOptions.FromString(encoded)


@dataclass(frozen=True, eq=False, slots=True)
class OpenedSession:
    """A session that a stream has, how its answers look, and those that the client has missed."""

    session: Session
    manifest: Manifest
    options: OutputOptions
    missed: list[HeldAnswer]
    first_step: int  # that the session had yet to apply when it was opened
    begun_s: float

    def answer_into(self, answer: StepsAnswer, applied: AppliedSteps) -> None:
        """What applied steps have brought, into an empty answer."""
        answer.first_step, answer.next_step = applied.first_step, applied.next_step
        if len(applied.outputs):
            codec.encode_into(answer.prediction, applied.outputs, self.manifest, self.options)

    def missed_into(self, answer: StepsAnswer, held: HeldAnswer) -> None:
        """One of the missed ones, into an empty answer."""
        self.answer_into(answer, AppliedSteps(self.session.next_step, held.next_step, held.outputs))

    async def end_sequence(self, owner: Owner, next_step: int, *, last_only: bool = False) -> StepsAnswer | None:
        """What the end of the sequence before the step of that index brings, if that is anything that is wanted.

        Raises SessionMoved, and ExecutionFailed; then nothing has changed.
        """
        if not self.session.ends_with_answers(next_step):
            return None
        answer = StepsAnswer()
        self.answer_into(answer, await self.session.end_sequence(owner, last_only=last_only))
        return answer


class Openings:
    """Opens sessions for streams."""

    def __init__(self, catalog: Catalog, sessions: SessionRegistry, limits: Limits) -> None:
        self._catalog = catalog
        self._sessions = sessions
        self._limits = limits

    async def open(self, wanted: OpenSession, answered_step: int, owner: Owner) -> OpenedSession:
        """Give the owner a session. Raises ServingError; if it is cancelled, too, the owner has none."""
        manifest = self._catalog.find(wanted.model, wanted.version).manifest
        if manifest.network.streamable:  # else that is what it is refused for
            codec.check_options(wanted.options, manifest)
        check_session_id(wanted.session_id)
        if wanted.resume_token:
            check_token(wanted.resume_token)
        if len(wanted.caller_id) > MAX_CALLER_ID_BYTES:
            raise FieldInvalid(f"a caller id has at most {MAX_CALLER_ID_BYTES} bytes", field="caller_id")
        opening = Opening(
            SessionKey(ANONYMOUS, wanted.session_id),
            wanted.resume_token,
            resume=wanted.resume,
            require_durable=wanted.require_durable,
            answered_step=answered_step,
            version=wanted.version,
            rebuild=wanted.rebuild,
            caller_id=wanted.caller_id,
            take_over=wanted.take_over,
        )
        session, missed = await self._sessions.open(opening, manifest, owner)
        manifest = self._catalog.find(*session.model).manifest  # version 0 may mean a newer one by now
        options = _options(wanted.options.SerializeToString(deterministic=True))
        return OpenedSession(session, manifest, options, missed, session.next_step, time.perf_counter())

    def describe(self, opened: OpenedSession) -> SessionOpened:
        """What the client is told of its session."""
        session = opened.session
        window_s = self._sessions.resume_window_s if session.resumable else 0.0
        return SessionOpened(
            model=opened.manifest.name,
            version=opened.manifest.version,
            next_step=session.next_step,
            max_steps_per_message=self._limits.max_steps_per_message,
            max_message_bytes=self._limits.max_message_bytes,
            durability=self._durability(session),
            resume_window=duration(window_s),
            text_unit=codec.text_unit(opened.manifest),
            look_ahead=opened.manifest.look_ahead,
            pending_answers=session.ledger.pending,
        )

    def _durability(self, session: Session) -> Durability.ValueType:
        if not session.resumable:
            return DURABILITY_NONE
        return DURABILITY_STORED if self._sessions.durable else DURABILITY_PROCESS
