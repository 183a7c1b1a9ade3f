from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from rnnserve.v1 import session_service_pb2 as pb
from rnnserve.v1.session_service_pb2_grpc import SessionServiceStub
from tests.support.server import start_server
from tests.support.wire import TIMEOUT_S, live_stream, open_, refusal_of, resume

TOKEN = b"0123456789abcdef"


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def channel(repository: Path, state_dir: Path) -> Iterator[grpc.Channel]:
    state_dir.mkdir()
    with (
        start_server(repository, state_dir, checkpoint_interval_s=0.05) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        yield channel


def get(channel: grpc.Channel, session_id: str) -> pb.Session:
    request = pb.GetSessionRequest(session_id=session_id)
    return SessionServiceStub(channel).GetSession(request, timeout=TIMEOUT_S).session


def test_live_and_parked_sessions_are_listed_by_id_page_by_page(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("accumulator", "b", token=TOKEN)) as parked:
        parked.step([[1.0], [2.0]])
        parked.wait_until_durable(2)
    stub = SessionServiceStub(channel)
    with live_stream(channel, open_("accumulator", "c", token=TOKEN)), live_stream(channel, open_("vanilla", "a")):
        first = stub.ListSessions(pb.ListSessionsRequest(page_size=2), timeout=TIMEOUT_S)
        rest = stub.ListSessions(
            pb.ListSessionsRequest(page_size=2, page_token=first.next_page_token), timeout=TIMEOUT_S
        )
    assert [session.session_id for session in [*first.sessions, *rest.sessions]] == ["a", "b", "c"]
    assert rest.next_page_token == ""
    a, b = first.sessions
    assert (a.model, a.version, a.state, a.next_step) == ("vanilla", 2, pb.SESSION_STATE_LIVE, 0)
    assert (b.model, b.version, b.state, b.next_step) == ("accumulator", 1, pb.SESSION_STATE_PARKED, 2)
    assert b.opened_at.seconds <= b.used_at.seconds
    assert b.size_bytes == 4 * (2 + 2 * 2)  # a state of two values, and two answers of two each
    assert get(channel, "b") == b


def test_a_deleted_session_is_gone_everywhere_at_once_and_its_stream_ends(
    channel: grpc.Channel, state_dir: Path
) -> None:
    name = "a-name-that-is-nowhere-else"
    opening = open_("accumulator", name, token=TOKEN)
    with live_stream(channel, opening) as stream:
        stream.step([[1.0]])
        stream.wait_until_durable(1)
        assert any(name.encode() in file.read_bytes() for file in state_dir.glob("sessions.sqlite*"))
        SessionServiceStub(channel).DeleteSession(pb.DeleteSessionRequest(session_id=name), timeout=TIMEOUT_S)
        assert not any(name.encode() in file.read_bytes() for file in state_dir.glob("sessions.sqlite*"))
        with pytest.raises(grpc.RpcError) as ended:
            stream.read()
        assert refusal_of(ended.value).reason == "SESSION_NOT_FOUND"
    with live_stream(channel) as again, pytest.raises(grpc.RpcError) as ended:
        again.ask(resume(opening, answered_step=1))
    assert refusal_of(ended.value).reason == "SESSION_NOT_FOUND"


@pytest.mark.parametrize("method", ["GetSession", "DeleteSession"])
def test_a_session_that_is_not_there_is_not_found(channel: grpc.Channel, method: str) -> None:
    request = pb.GetSessionRequest if method == "GetSession" else pb.DeleteSessionRequest
    with pytest.raises(grpc.RpcError) as ended:
        getattr(SessionServiceStub(channel), method)(request(session_id="nobody"), timeout=TIMEOUT_S)
    refusal = refusal_of(ended.value)
    assert (refusal.reason, refusal.field) == ("SESSION_NOT_FOUND", "session_id")
