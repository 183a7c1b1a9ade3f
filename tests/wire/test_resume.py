"""Sessions that outlive their streams and their servers, without our client."""

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest

from rnnserve.v1.real_time_service_pb2 import (
    DURABILITY_NONE,
    DURABILITY_PROCESS,
    DURABILITY_STORED,
    NOTICE_REASON_DRAINING,
    NOTICE_REASON_EVICTED,
)
from tests.support.bundles import accumulated
from tests.support.server import RunningServer, start_server
from tests.support.wire import (
    TIMEOUT_S,
    LiveStream,
    Response,
    array,
    close,
    live_stream,
    metric,
    open_,
    refusal_of,
    reset,
    resume,
    steps,
)

TOKEN = b"0123456789abcdef"
VALUES = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
SUMS = accumulated(VALUES)


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def accumulate(stream: LiveStream, *indices: int) -> None:
    """Step through the values at these indices, one message each; the answers must be the right sums."""
    for index in indices:
        assert [tuple(row) for row in stream.step([[VALUES[index]]]).tolist()] == [SUMS[index]]


def rows(response: Response) -> tuple[int, list[tuple[float, float]]]:
    assert response.WhichOneof("response") == "answer", response
    return response.answer.first_step, [tuple(row) for row in array(response.answer.prediction.outputs).tolist()]


def cut(stream: LiveStream) -> None:
    """End the call as a client does that vanishes."""
    stream.call.cancel()


def test_a_session_goes_on_after_its_stream_was_cut(channel: grpc.Channel) -> None:
    opening = open_("accumulator", "cut", token=TOKEN)
    with live_stream(channel, opening) as stream:
        accumulate(stream, 0, 1, 2)
        cut(stream)
    with live_stream(channel, resume(opening, answered_step=3)) as stream:
        assert stream.next_step == 3
        accumulate(stream, 3, 4)


def test_missed_answers_come_first(channel: grpc.Channel) -> None:
    opening = open_("accumulator", "missed", token=TOKEN)
    with live_stream(channel, opening) as stream:
        accumulate(stream, 0, 1, 2, 3)
    with live_stream(channel, resume(opening, answered_step=2)) as stream:
        assert [rows(stream.read()) for _ in range(2)] == [(2, [SUMS[2]]), (3, [SUMS[3]])]
        accumulate(stream, 4)


def test_steps_that_are_sent_again_are_answered_again_and_not_applied(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("accumulator", "again", token=TOKEN)) as stream:
        accumulate(stream, 0, 1, 2)
        assert rows(stream.ask(steps(1, [[VALUES[1]], [VALUES[2]], [VALUES[3]]]))) == (1, SUMS[1:4])
        stream.next_step = 4
        accumulate(stream, 4)


def test_acknowledged_answers_are_not_held(channel: grpc.Channel) -> None:
    opening = open_("accumulator", "acknowledged", token=TOKEN)
    with live_stream(channel, opening) as stream:
        accumulate(stream, 0, 1)
        request = steps(2, [[VALUES[2]]])
        request.answered_step = 2
        stream.ask(request)
    with live_stream(channel) as stream, pytest.raises(grpc.RpcError) as ended:
        stream.ask(resume(opening, answered_step=1))
    refusal = refusal_of(ended.value)
    assert (refusal.reason, refusal.metadata) == ("RESUME_POINT_LOST", {"expected_step": "2"})
    with live_stream(channel, resume(opening, answered_step=2)) as stream:
        assert rows(stream.read()) == (2, [SUMS[2]])


def test_the_newest_open_owns_the_session_and_the_older_stream_is_told(channel: grpc.Channel) -> None:
    opening = open_("accumulator", "moved", token=TOKEN)
    with live_stream(channel, opening) as older:
        accumulate(older, 0, 1)
        with live_stream(channel, resume(opening, answered_step=2)) as newer:
            accumulate(newer, 2)
            with pytest.raises(grpc.RpcError) as ended:
                older.read()
            assert ended.value.code() == grpc.StatusCode.ABORTED
            assert refusal_of(ended.value).reason == "SESSION_MOVED"
            accumulate(newer, 3)


def test_of_several_that_resume_at_once_one_goes_on_and_the_others_are_told(server: RunningServer) -> None:
    with grpc.insecure_channel(server.target) as channel, live_stream(channel, open_("accumulator", "m", token=TOKEN)):
        pass
    opening, begin = open_("accumulator", "m", token=TOKEN), threading.Barrier(4)
    moved: SimpleQueue[str] = SimpleQueue()
    going_on: SimpleQueue[LiveStream] = SimpleQueue()

    def come_back() -> None:
        alone = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.target, options=alone) as channel, live_stream(channel) as stream:
            grpc.channel_ready_future(channel).result()
            begin.wait()
            try:
                stream.ask(resume(opening))
                going_on.put(stream)
                stream.read()
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.CANCELLED:
                    moved.put(refusal_of(error).reason)

    threads = [threading.Thread(target=come_back) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert [moved.get(timeout=TIMEOUT_S) for _ in range(3)] == ["SESSION_MOVED"] * 3
    while any(thread.is_alive() for thread in threads):
        going_on.get(timeout=TIMEOUT_S).call.cancel()
        for thread in threads:
            thread.join(0.1)


def test_a_caller_that_comes_back_after_another_one_is_told_and_gets_nothing(channel: grpc.Channel) -> None:
    opening = open_("accumulator", "zombie", token=TOKEN)
    first, second = resume(opening), resume(opening)
    opening.open.caller_id = first.open.caller_id = b"first"
    second.open.caller_id = b"second"
    with live_stream(channel, opening) as stream:
        accumulate(stream, 0)
        cut(stream)
    with live_stream(channel) as refused, pytest.raises(grpc.RpcError) as ended:
        refused.ask(second)
    assert refusal_of(ended.value).reason == "SESSION_MOVED"
    second.open.take_over = True
    with live_stream(channel) as other:
        assert other.ask(second).opened.next_step == 1
        with live_stream(channel) as zombie, pytest.raises(grpc.RpcError) as ended:
            zombie.ask(first)
        assert refusal_of(ended.value).reason == "SESSION_MOVED"
        assert rows(other.read()) == (0, [SUMS[0]])
        other.next_step = 1
        accumulate(other, 1)


def test_a_takeover_that_was_answered_survives_a_crash(repository: Path, tmp_path: Path) -> None:
    opening = open_("accumulator", "taken", token=TOKEN)
    former, newer = resume(opening), resume(opening)
    opening.open.caller_id = former.open.caller_id = b"former"
    newer.open.caller_id, newer.open.take_over = b"newer", True
    with (
        start_server(repository, tmp_path, checkpoint_interval_s=60) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, opening) as stream,
    ):
        cut(stream)
        with live_stream(channel) as other:
            assert other.ask(newer).HasField("opened")
            server.kill()
    with start_server(repository, tmp_path) as server, grpc.insecure_channel(server.target) as channel:
        with live_stream(channel) as zombie, pytest.raises(grpc.RpcError) as ended:
            zombie.ask(former)
        assert refusal_of(ended.value).reason == "SESSION_MOVED"


def test_another_token_never_gets_a_session(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("accumulator", "mine", token=TOKEN)) as stream:
        accumulate(stream, 0)
        with live_stream(channel) as thief, pytest.raises(grpc.RpcError) as ended:
            thief.ask(resume(open_("accumulator", "mine", token=b"fedcba9876543210")))
        assert refusal_of(ended.value).reason == "SESSION_EXISTS"
        accumulate(stream, 1)


def test_a_closed_session_is_gone_once_all_is_acknowledged(channel: grpc.Channel) -> None:
    opening = open_("accumulator", "closed", token=TOKEN)
    with live_stream(channel, opening) as stream:
        accumulate(stream, 0)
        request = close()
        request.answered_step = 1
        assert stream.ask(request).closed.next_step == 1
    with live_stream(channel) as stream, pytest.raises(grpc.RpcError) as ended:
        stream.ask(resume(opening, answered_step=1))
    assert refusal_of(ended.value).reason == "SESSION_NOT_FOUND"


def test_a_close_out_of_order_is_refused_and_the_stream_goes_on(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("accumulator", "close-early", token=TOKEN)) as stream:
        accumulate(stream, 0)
        request = close()
        request.close.first_step = 5
        assert stream.ask(request).WhichOneof("response") == "error"
        accumulate(stream, 1)


def test_a_reset_is_done_once_however_often_it_is_sent(channel: grpc.Channel) -> None:
    opening = open_("accumulator", "reset-twice", token=TOKEN)
    with live_stream(channel, opening) as stream:
        accumulate(stream, 0)
        stream.ask(reset(1))
        first = stream.step([[7.0]])
        assert stream.ask(reset(1)).reset.next_step == 2
        assert first.tolist() == [[7.0, 0.0]]
        assert stream.step([[1.0]]).tolist() == [[8.0, 7.0]]


def test_a_bad_token_is_refused_by_its_field(channel: grpc.Channel) -> None:
    with live_stream(channel) as stream, pytest.raises(grpc.RpcError) as ended:
        stream.ask(open_("accumulator", "bad", token=b"short"))
    assert (refusal_of(ended.value).reason, refusal_of(ended.value).field) == ("FIELD_INVALID", "open.resume_token")


def test_an_open_says_what_its_session_survives(channel: grpc.Channel, repository: Path) -> None:
    with live_stream(channel, open_("accumulator", "tokenless")) as stream:
        assert (stream.opened.durability, stream.opened.resume_window.seconds) == (DURABILITY_NONE, 0)
    with live_stream(channel, open_("accumulator", "with-token", token=TOKEN)) as stream:
        assert (stream.opened.durability, stream.opened.resume_window.seconds) == (DURABILITY_STORED, 3600)
    with (
        start_server(repository, session_store="memory") as in_memory,
        grpc.insecure_channel(in_memory.target) as other,
        live_stream(other, open_("accumulator", "a", token=TOKEN)) as stream,
    ):
        assert stream.opened.durability == DURABILITY_PROCESS


def test_durable_steps_and_their_answers_survive_a_crash(repository: Path, tmp_path: Path) -> None:
    opening = open_("accumulator", "crash", token=TOKEN)
    with (
        start_server(repository, tmp_path, checkpoint_interval_s=0.05) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, opening) as stream,
    ):
        accumulate(stream, 0, 1, 2)
        stream.wait_until_durable(3)
        server.kill()
    with (
        start_server(repository, tmp_path) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, resume(opening, answered_step=1)) as stream,
    ):
        assert (stream.next_step, stream.durable_step) == (3, 3)
        assert [rows(stream.read()) for _ in range(2)] == [(1, [SUMS[1]]), (2, [SUMS[2]])]
        accumulate(stream, 3, 4)


def test_a_drain_parks_quiet_streams_at_once_and_all_that_was_answered_is_there_again(
    repository: Path, tmp_path: Path
) -> None:
    opening = open_("accumulator", "drain", token=TOKEN)
    settings = {"checkpoint_interval_s": 3_600, "drain_timeout_s": 60}
    with (
        start_server(repository, tmp_path, **settings) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, opening) as stream,
    ):
        accumulate(stream, 0, 1, 2)
        server.terminate()
        assert stream.read().notice.reason == NOTICE_REASON_DRAINING
        with pytest.raises(grpc.RpcError) as ended:
            stream.read()
        assert refusal_of(ended.value).reason == "DRAINING"
        assert server.process.wait(30) == 0
    with (
        start_server(repository, tmp_path) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, resume(opening, answered_step=3)) as stream,
    ):
        assert stream.next_step == 3
        accumulate(stream, 3)


def test_a_second_signal_ends_the_server_at_once(repository: Path) -> None:
    with (
        start_server(repository, drain_timeout_s=60) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, open_("accumulator", "stays")) as stream,
    ):
        server.terminate()
        assert stream.read().notice.reason == NOTICE_REASON_DRAINING
        server.terminate()
        assert server.process.wait(5) == -15


def test_an_idle_stream_is_told_and_parked(repository: Path) -> None:
    opening = open_("accumulator", "idle", token=TOKEN)
    with start_server(repository, idle_timeout_s=0.2) as server, grpc.insecure_channel(server.target) as channel:
        with live_stream(channel, opening) as stream:
            accumulate(stream, 0)
            assert stream.read().notice.reason == NOTICE_REASON_EVICTED
            with pytest.raises(grpc.RpcError) as ended:
                stream.read()
        refusal = refusal_of(ended.value)
        assert (refusal.reason, refusal.metadata) == ("EVICTED", {"limit": "idle_timeout_s", "resumable": "true"})
        assert metric(server.metrics_url, "rnnserve_evictions_total", limit="idle_timeout_s") == 1
        with live_stream(channel, resume(opening, answered_step=1)) as stream:
            accumulate(stream, 1)


def test_two_servers_cannot_share_a_state_folder(repository: Path, tmp_path: Path) -> None:
    with (
        start_server(repository, tmp_path),
        pytest.raises(RuntimeError, match="in use by another server"),
        start_server(repository, tmp_path),
    ):
        pass
