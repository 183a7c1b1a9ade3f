"""SessionService: which sessions there are, and how one is erased."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from rnnserve.v1 import session_service_pb2 as pb
from rnnserve.v1.session_service_pb2_grpc import SessionServiceServicer
from service.sessions.record import ANONYMOUS, SessionKey
from service.sessions.registry import SessionRegistry
from service.sessions.table import SessionInfo

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

MAX_PAGE_SIZE = 1_000


class SessionService(SessionServiceServicer):
    """See the contract."""

    def __init__(self, sessions: SessionRegistry) -> None:
        self._sessions = sessions

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


def _timestamp(time_s: float) -> Timestamp:
    return Timestamp(seconds=int(time_s), nanos=int(time_s % 1 * 1e9))
