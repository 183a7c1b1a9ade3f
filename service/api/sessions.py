"""SessionService: which sessions there are, and how one is erased or copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from rnnserve.v1 import session_service_pb2 as pb
from rnnserve.v1.session_service_pb2_grpc import SessionServiceServicer
from service.api.identities import check_session_id, check_token
from service.api.limits import Limits
from service.errors import SessionExists
from service.sessions.copies import SessionCopies
from service.sessions.record import ANONYMOUS, SessionKey
from service.sessions.registry import SessionRegistry
from service.sessions.snapshots import Snapshot
from service.sessions.table import SessionInfo

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

MAX_PAGE_SIZE = 1_000


class SessionService(SessionServiceServicer):
    """See the contract."""

    def __init__(self, sessions: SessionRegistry, copies: SessionCopies, limits: Limits) -> None:
        self._sessions = sessions
        self._copies = copies
        self._limits = limits

    async def ListSessions(
        self,
        request: pb.ListSessionsRequest,
        context: ServicerContext[pb.ListSessionsRequest, pb.ListSessionsResponse],  # noqa: ARG002
    ) -> pb.ListSessionsResponse:
        """A page token is the last id of the page before, so sessions that come and go skip no other."""
        size = min(request.page_size or MAX_PAGE_SIZE, MAX_PAGE_SIZE)
        found = await self._sessions.after(SessionKey(ANONYMOUS, request.page_token), size + 1)
        more = found[size - 1].summary.key.session_id if len(found) > size else ""
        return pb.ListSessionsResponse(sessions=map(_describe, found[:size]), next_page_token=more)

    async def GetSession(
        self,
        request: pb.GetSessionRequest,
        context: ServicerContext[pb.GetSessionRequest, pb.GetSessionResponse],  # noqa: ARG002
    ) -> pb.GetSessionResponse:
        """Raises SessionNotFound."""
        return pb.GetSessionResponse(session=_describe(await self._sessions.find(_key(request.session_id))))

    async def DeleteSession(
        self,
        request: pb.DeleteSessionRequest,
        context: ServicerContext[pb.DeleteSessionRequest, pb.DeleteSessionResponse],  # noqa: ARG002
    ) -> pb.DeleteSessionResponse:
        """Raises SessionNotFound, and StoreUnavailable where only memory could be cleared so far."""
        await self._sessions.delete(_key(request.session_id))
        return pb.DeleteSessionResponse()

    async def ExportSession(
        self,
        request: pb.ExportSessionRequest,
        context: ServicerContext[pb.ExportSessionRequest, pb.ExportSessionResponse],  # noqa: ARG002
    ) -> pb.ExportSessionResponse:
        """Raises NotEnabled, SessionNotFound."""
        return pb.ExportSessionResponse(snapshot=_snapshot(*await self._copies.export(_key(request.session_id))))

    async def ImportSession(
        self,
        request: pb.ImportSessionRequest,
        context: ServicerContext[pb.ImportSessionRequest, pb.ImportSessionResponse],  # noqa: ARG002
    ) -> pb.ImportSessionResponse:
        """Raises NotEnabled, SnapshotInvalid, BundleMismatch, SessionExists, SessionLimit, StoreUnavailable."""
        self._limits.check_size(request.ByteSize())
        check_session_id(request.session_id)
        check_token(request.resume_token)
        copy = await self._copies.import_(request.snapshot, _key(request.session_id), request.resume_token)
        return pb.ImportSessionResponse(session=_describe(copy.info), pending_answers=copy.pending)

    async def ForkSession(
        self,
        request: pb.ForkSessionRequest,
        context: ServicerContext[pb.ForkSessionRequest, pb.ForkSessionResponse],  # noqa: ARG002
    ) -> pb.ForkSessionResponse:
        """Raises SessionNotFound, SessionExists, SessionLimit, StoreUnavailable."""
        check_session_id(request.new_session_id, field="new_session_id")
        check_token(request.new_resume_token, field="new_resume_token")
        key, new_key = _key(request.session_id), _key(request.new_session_id)
        try:
            copy = await self._copies.fork(key, new_key, request.new_resume_token)
        except SessionExists as error:
            error.field = "new_session_id"
            raise
        return pb.ForkSessionResponse(session=_describe(copy.info), pending_answers=copy.pending)


def _key(session_id: str) -> SessionKey:
    return SessionKey(ANONYMOUS, session_id)


def _describe(info: SessionInfo) -> pb.Session:
    summary = info.summary
    return pb.Session(
        session_id=summary.key.session_id,
        model=summary.model.name,
        version=summary.model.version,
        state=pb.SESSION_STATE_LIVE if info.live else pb.SESSION_STATE_PARKED,
        next_step=summary.next_step,
        opened_at=_timestamp(summary.opened_s),
        used_at=_timestamp(summary.used_s),
        size_bytes=summary.size_bytes,
    )


def _snapshot(snapshot: Snapshot, data: bytes) -> pb.Snapshot:
    state = snapshot.state
    return pb.Snapshot(
        data=data,
        model=state.model.name,
        version=state.model.version,
        weights_sha256=state.weights_sha256,
        next_step=state.next_step,
        created_at=_timestamp(snapshot.created_s),
        expires_at=_timestamp(snapshot.expires_s) if snapshot.expires_s else None,
        key_id=snapshot.key_id,
    )


def _timestamp(time_s: float) -> Timestamp:
    return Timestamp(seconds=int(time_s), nanos=int(time_s % 1 * 1e9))
