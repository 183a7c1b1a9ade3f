"""A network that answers about a step only once it has read three more: over the wire, and through our client."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from rnnserve import Answer, AsyncClient, Client
from rnnserve.cli.app import app
from rnnserve.v1 import real_time_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import STEP_SELECTION_ALL, STEP_SELECTION_LAST, Prediction, StepSelection
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from tests.support.bundles import LOOK_AHEAD, accumulated
from tests.support.multiplexed import close_handle, multiplexed, reset_handle, step_each
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer, start_server
from tests.support.wire import (
    TIMEOUT_S,
    LiveStream,
    Response,
    array,
    close,
    live_stream,
    open_,
    predict,
    reset,
    resume,
    steps,
)

TOKEN = b"0123456789abcdef"
VALUES = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
SUMS = accumulated(VALUES, look_ahead=LOOK_AHEAD)
COLUMN = [[value] for value in VALUES]
KEYS = f"2026-11:{'5a' * 32}\n"


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def sums(prediction: Prediction) -> list[tuple[float, ...]]:
    return [tuple(row) for row in array(prediction.outputs).tolist()] if prediction.HasField("outputs") else []


def rows(answer: pb.StepsAnswer) -> tuple[int, list[tuple[float, ...]]]:
    """The step that the first row is about, and the rows."""
    return answer.first_step, sums(answer.prediction)


def send(stream: LiveStream, start: int, end: int) -> tuple[int, list[tuple[float, ...]]]:
    response = stream.ask(steps(start, COLUMN[start:end]))
    assert response.WhichOneof("response") == "answer", response
    assert response.answer.next_step == end
    return rows(response.answer)


def acknowledged(request: pb.StreamStepsRequest, answered_step: int) -> pb.StreamStepsRequest:
    request.answered_step = answered_step
    return request


def found(answers: list[Answer]) -> list[tuple[int, tuple[float, ...]]]:
    return [(answer.step, tuple(answer.output.tolist())) for answer in answers]


def test_answers_come_once_the_steps_behind_are_read_and_name_the_step_that_they_are_about(
    channel: grpc.Channel,
) -> None:
    with live_stream(channel, open_("ahead", "ahead-late", token=TOKEN)) as stream:
        assert (stream.opened.look_ahead, stream.opened.pending_answers) == (LOOK_AHEAD, 0)
        assert send(stream, 0, 2) == (0, [])
        assert send(stream, 2, 3) == (0, [])
        assert send(stream, 3, 5) == (0, SUMS[:2])
        assert send(stream, 5, 8) == (2, SUMS[2:5])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_reset_brings_the_last_answers_and_the_next_sequence_begins_without_any(
    channel: grpc.Channel, count: int
) -> None:
    with live_stream(channel, open_("ahead", f"ahead-reset-{count}", token=TOKEN)) as stream:
        send(stream, 0, count)
        wanted = accumulated(VALUES[:count], look_ahead=LOOK_AHEAD)
        ended = stream.ask(reset(count)).reset
        first = max(0, count - LOOK_AHEAD)
        assert (ended.next_step, rows(ended.last)) == (count, (first, wanted[first:]))
        assert not stream.ask(reset(count)).reset.HasField("last"), "there is nothing left to bring"
        assert send(stream, count, count + 2) == (count, [])
        again = stream.ask(reset(count + 2)).reset.last
        assert rows(again) == (count, accumulated(VALUES[count : count + 2], look_ahead=LOOK_AHEAD))


def test_of_several_answers_the_last_one_alone_comes_where_only_that_is_asked_for(channel: grpc.Channel) -> None:
    opening = open_("ahead", "ahead-last", token=TOKEN, steps=STEP_SELECTION_LAST)
    with live_stream(channel, opening) as stream:
        assert send(stream, 0, 2) == (0, [])
        assert send(stream, 2, 7) == (3, [SUMS[3]])
        wanted = accumulated(VALUES[:7], look_ahead=LOOK_AHEAD)
        assert rows(stream.ask(reset(7)).reset.last) == (6, [wanted[6]])


def test_a_stream_that_was_cut_goes_on_with_the_answers_that_it_missed(channel: grpc.Channel) -> None:
    opening = open_("ahead", "ahead-cut", token=TOKEN)
    with live_stream(channel, opening) as stream:
        send(stream, 0, 6)
    with live_stream(channel, resume(opening, answered_step=1)) as stream:
        assert (stream.next_step, stream.opened.pending_answers) == (6, 3)
        missed = stream.read().answer
        assert (missed.next_step, rows(missed)) == (6, (1, SUMS[1:3]))
        assert rows(stream.ask(steps(4, COLUMN[4:7])).answer) == (1, SUMS[1:4]), "two of them were applied before"
        assert send(stream, 7, 8) == (4, [SUMS[4]])


def test_a_close_brings_the_last_answers_and_its_session_waits_until_they_are_acknowledged(
    channel: grpc.Channel,
) -> None:
    opening = open_("ahead", "ahead-closed", token=TOKEN)
    with live_stream(channel, opening) as stream:
        send(stream, 0, 8)
        closed = stream.ask(acknowledged(close(), 5)).closed
        assert (closed.next_step, closed.erased, rows(closed.last)) == (8, False, (5, SUMS[5:]))
    with live_stream(channel, resume(opening, answered_step=6)) as stream:  # as if the answer had been lost
        assert stream.opened.pending_answers == 0
        assert rows(stream.read().answer) == (6, SUMS[6:])
        assert rows(stream.ask(steps(8, COLUMN[:1])).answer) == (8, []), "what comes now is another sequence"
        closed = stream.ask(acknowledged(close(), 8)).closed
        assert (closed.erased, rows(closed.last)) == (False, (8, accumulated(VALUES[:1], look_ahead=LOOK_AHEAD)))
    with live_stream(channel, resume(opening, answered_step=9)) as stream:
        assert stream.ask(acknowledged(close(), 9)).closed.erased
    with live_stream(channel) as stream, pytest.raises(grpc.RpcError) as ended:
        stream.ask(resume(opening, answered_step=9))
    assert ended.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_close_that_wants_no_more_answers_erases_the_session_at_once(channel: grpc.Channel) -> None:
    with live_stream(channel, open_("ahead", "ahead-unwanted", token=TOKEN)) as stream:
        send(stream, 0, 8)
        closed = stream.ask(acknowledged(close(), 8)).closed
        assert (closed.erased, closed.HasField("last")) == (True, False)


def test_a_crash_of_the_server_costs_no_answer_and_repeats_none(repository: Path, tmp_path: Path) -> None:
    opening = open_("ahead", "ahead-crash", token=TOKEN)
    with (
        start_server(repository, tmp_path, checkpoint_interval_s=0.01) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, opening) as stream,
    ):
        assert send(stream, 0, 5) == (0, SUMS[:2])
        stream.wait_until_durable(5)
        server.kill()
    with (
        start_server(repository, tmp_path) as server,
        grpc.insecure_channel(server.target) as channel,
        live_stream(channel, resume(opening, answered_step=1)) as stream,
    ):
        assert (stream.next_step, stream.opened.pending_answers) == (5, 3)
        assert rows(stream.read().answer) == (1, [SUMS[1]])
        assert send(stream, 5, 8) == (2, SUMS[2:5])
        assert rows(stream.ask(reset(8)).reset.last) == (5, SUMS[5:])


def row_of(response: pb.MultiplexStepsResponse) -> tuple[list[int], list[int], list[tuple[float, ...]]]:
    answer = response.answer
    return list(answer.handles), list(answer.first_steps), sums(answer.prediction)


def test_on_a_call_of_many_each_step_is_answered_once_with_a_row_or_without(channel: grpc.Channel) -> None:
    with multiplexed(channel) as call:
        assert call.open(1, "ahead", "m1", token=TOKEN).opened.look_ahead == LOOK_AHEAD
        for step in range(LOOK_AHEAD):
            assert row_of(call.ask(step_each({1: step}, [COLUMN[step]]))) == ([1], [step], [])
        assert row_of(call.ask(step_each({1: 3}, [COLUMN[3]]))) == ([1], [0], [SUMS[0]])
        call.open(2, "ahead", "m2", token=TOKEN)
        call.send(step_each({1: 4, 2: 0}, [COLUMN[4], COLUMN[0]]))
        both = [row_of(call.read()) for _ in range(2)]
        assert sorted(both) == [([1], [1], [SUMS[1]]), ([2], [0], [])]
        assert row_of(call.ask(step_each({1: 4}, [COLUMN[4]]))) == ([1], [1], [SUMS[1]]), "as it was answered before"
        ended = call.ask(reset_handle(1, 5)).reset
        wanted = accumulated(VALUES[:5], look_ahead=LOOK_AHEAD)
        assert (ended.handle, ended.next_step, rows(ended.last)) == (1, 5, (2, wanted[2:]))
        assert row_of(call.ask(step_each({1: 5}, [COLUMN[5]]))) == ([1], [5], [])
        closed = call.ask(close_handle(2, 1)).closed.closed
        assert (closed.erased, rows(closed.last)) == (False, (0, accumulated(VALUES[:1], look_ahead=LOOK_AHEAD)))


def test_a_reset_of_a_handle_goes_on_with_the_steps_that_were_sent_behind_it(channel: grpc.Channel) -> None:
    with multiplexed(channel) as call:
        call.open(1, "ahead", "behind", token=TOKEN)
        call.send(step_each({1: 0}, [COLUMN[0]]), reset_handle(1, 1), step_each({1: 1}, [COLUMN[1]]))
        assert row_of(call.read()) == ([1], [0], [])
        assert rows(call.read().reset.last) == (0, accumulated(VALUES[:1], look_ahead=LOOK_AHEAD))
        assert row_of(call.read()) == ([1], [1], [])


@pytest.mark.parametrize("selection", [STEP_SELECTION_ALL, STEP_SELECTION_LAST])
def test_whole_sequences_get_an_answer_about_each_of_their_steps(
    channel: grpc.Channel, selection: StepSelection.ValueType
) -> None:
    request = predict("ahead", [COLUMN, COLUMN[:1]], steps=selection)
    long, short = SequenceServiceStub(channel).Predict(request, timeout=TIMEOUT_S).predictions
    wanted = SUMS if selection == STEP_SELECTION_ALL else SUMS[-1:]
    assert (sums(long), sums(short)) == (wanted, accumulated(VALUES[:1], look_ahead=LOOK_AHEAD))


def test_our_client_says_which_step_each_answer_is_about_and_finish_brings_the_last_ones(client: Client) -> None:
    assert client.model("ahead").look_ahead == LOOK_AHEAD
    with client.stream("ahead") as stream:
        first = [stream.step(step) for step in COLUMN[:LOOK_AHEAD]]
        assert [(answer.step, answer.output.shape, answer.label) for answer in first] == [(-1, (0,), None)] * 3
        answers = [stream.step(step) for step in COLUMN[LOOK_AHEAD:]]
        assert found([*answers, *stream.finish()]) == list(enumerate(SUMS))
        assert stream.finish() == []
        second = [*stream.steps(COLUMN[:4]), *stream.finish()]
        wanted = accumulated(VALUES[:4], look_ahead=LOOK_AHEAD)
        assert found(second) == list(enumerate(wanted, start=8))


@pytest.mark.parametrize("look_ahead", [0, LOOK_AHEAD])
def test_a_stream_that_is_closed_leaves_no_session_behind(client: Client, look_ahead: int) -> None:
    model = "ahead" if look_ahead else "accumulator"
    with client.stream(model) as stream:
        list(stream.steps(COLUMN))
    with client.multiplex(model) as call:
        for step in COLUMN:
            call.step(["left-behind"], [step])
    assert not {stream.session, "left-behind"} & {info.id for info in client.sessions()}
    assert not [*stream.notices, *call.notices]


async def test_our_client_awaits_them_too(server: RunningServer) -> None:
    async with AsyncClient(server.target) as client, client.stream("ahead") as stream:
        answers = [answer async for answer in stream.steps(COLUMN, ahead=2)]
        assert (await stream.step([0.0])).step == 5
        await stream.reset()
        assert (await stream.step([0.0])).step == -1
    assert found(answers) == list(enumerate(SUMS[:5]))


def test_many_sessions_of_our_client_have_a_row_without_a_step_until_there_is_an_answer(client: Client) -> None:
    with client.multiplex("ahead") as call:
        for i in range(LOOK_AHEAD):
            assert call.step(["a", "b"], [COLUMN[i], COLUMN[i]]).steps.tolist() == [-1, -1]
        call.step(["b"], [COLUMN[3]])
        answer = call.step(["a", "b"], [COLUMN[3], COLUMN[4]])
        assert (answer.steps.tolist(), answer.errors) == ([0, 1], {})
        assert [tuple(output) for output in answer.outputs.tolist()] == SUMS[:2]
        call.send(["a"], [COLUMN[4]])
        last = call.finish(["a"])
        assert (last.sessions, last.steps.tolist()) == (("a",) * 4, [1, 2, 3, 4])
        assert [tuple(output) for output in last.outputs.tolist()] == accumulated(VALUES[:5], look_ahead=3)[1:]
        assert call.step(["a"], [COLUMN[0]]).steps.tolist() == [-1]
        call.reset(["a"])
        received = call.receive()
        assert received is not None
        assert received.steps.tolist() == [5]
        resumed = call.resume_point("b")
        call.park()
    with client.stream("ahead", resume=resumed) as stream:
        assert (stream.missed, stream.next_step) == ([], 5)
        assert found(stream.finish()) == list(enumerate(accumulated(VALUES[:5], look_ahead=3)))[2:]


def test_copies_bring_the_answers_that_were_still_to_come(repository: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    with start_server(repository, snapshot_key_file=keys) as server, Client(server.target) as client:
        with client.stream("ahead", session="original") as stream:
            list(stream.steps(COLUMN[:6]))
            points = [client.fork_session("original"), client.import_session(client.export_session("original").data)]
            others = [tuple(stream.step(step).output.tolist()) for step in COLUMN[6:]]
        assert others == SUMS[3:5]
        for point in points:
            assert point.answered_step == 3
            with client.stream("ahead", resume=point) as copy:
                assert (copy.next_step, copy.missed) == (6, [])
                answers = [*copy.steps(COLUMN[6:]), *copy.finish()]
            assert found(answers) == list(enumerate(SUMS))[3:]


def test_a_text_is_followed_by_the_padding_that_the_model_names(client: Client, repository: Path) -> None:
    text = "ab c a"
    wanted = Reference(repository / "text-ahead" / "1").predict(text)
    (prediction,) = client.predict("text-ahead", [text])
    with client.stream("text-ahead") as stream:
        answers = [*stream.steps(text), *stream.finish()]
    assert_close(prediction.outputs, wanted)
    assert_close(np.stack([answer.output for answer in answers]), wanted)
    assert tuple(answer.label for answer in answers) == prediction.labels


def test_the_command_line_prints_an_answer_about_each_step(server: RunningServer, tmp_path: Path) -> None:
    file, run = tmp_path / "steps.csv", CliRunner().invoke
    file.write_text("x\n" + "\n".join(f"{value:g}" for value in VALUES))
    wanted = [(step, list(output)) for step, output in enumerate(SUMS)]
    for name, given in ((str(file), None), ("-", file.read_text())):
        result = run(app, ["--target", server.target, "--json", "stream", "ahead", name], input=given)
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(line["step"], line["output"]) for line in lines] == wanted
    file.write_text("1\n2\n3\n4\n5\nnan\n7")
    refused = run(app, ["--target", server.target, "stream", "ahead", str(file)])
    assert refused.exit_code == 1
    assert f"{file}, line 6" in refused.stderr.replace("\n", "")
    assert "3 steps" in run(app, ["--target", server.target, "models", "ahead"]).stdout


def test_what_a_network_cannot_answer_about_the_end_of_a_sequence_is_refused_and_changes_nothing(
    channel: grpc.Channel,
) -> None:
    huge = 3e38  # one is a number, the sum of the sums of several is none
    with live_stream(channel, open_("ahead", "ahead-huge", token=TOKEN)) as stream:
        refused: Response = stream.ask(steps(0, [[huge]]))
        assert rows(refused.answer) == (0, [])
        for request in (reset(1), close()):
            assert stream.ask(request).WhichOneof("response") == "error"
        assert stream.ask(acknowledged(close(), 1)).closed.erased
