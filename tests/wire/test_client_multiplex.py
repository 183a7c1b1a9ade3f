"""Many sessions on one stream, with our client, against a real server."""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rnnserve import (
    AsyncClient,
    Client,
    ModelNotFound,
    NotFinite,
    ResumePoint,
    SessionExists,
    SessionMoved,
    SessionNotFound,
    ShapeMismatch,
    StepsMissing,
    StoreUnavailable,
    TooManySteps,
    UnknownSymbol,
)
from tests.support.bundles import LABELS, accumulated
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer, free_port, start_server
from tests.support.wire import eventually, random_steps

VALUES = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
SUMS = accumulated(VALUES)
NAN = float("nan")


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def names(count: int) -> list[str]:
    """New ones."""
    return [f"{secrets.token_hex(4)}-{number}" for number in range(count)]


def column(value: float, sessions: int) -> list[list[float]]:
    return [[value]] * sessions


def test_each_session_gives_the_outputs_of_its_whole_sequence(client: Client, repository: Path) -> None:
    sessions = names(5)
    recordings = np.stack([random_steps(12, seed) for seed in range(5)])
    with client.multiplex("stacked") as stream:
        rows = np.stack([stream.step(sessions, recordings[:, step]).outputs for step in range(12)])
    for number in range(5):
        assert_close(rows[:, number], Reference(repository / "stacked" / "1").predict(recordings[number]))


def test_rows_are_in_the_order_of_the_sessions_asked_for(client: Client) -> None:
    a, b, c = sessions = names(3)
    with client.multiplex("accumulator") as stream:
        assert stream.step(sessions, [[1], [2], [3]]).outputs[:, 0].tolist() == [1, 2, 3]
        answer = stream.step([c, a], [[10], [20]])
        assert (answer.sessions, answer.outputs[:, 0].tolist(), answer.steps.tolist()) == ((c, a), [13, 21], [1, 1])
        assert stream.step([b, c, a], [[0], [0], [0]]).steps.tolist() == [1, 2, 2]


def test_labels_probabilities_and_the_top_labels_are_those_of_each_session(client: Client) -> None:
    sessions = names(3)
    with client.multiplex("vanilla", probabilities=True, top_k=2) as stream:
        answer = stream.step(sessions, random_steps(3))
    assert answer.probabilities is not None
    np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, rtol=1e-5)
    best = answer.probabilities.argmax(axis=1)
    assert answer.labels == tuple(LABELS[label] for label in best)
    assert [top[0].label for top in answer.top] == list(answer.labels)


def test_a_text_model_reads_a_character_of_each(client: Client, repository: Path) -> None:
    reference = Reference(repository / "text" / "1")
    sessions = names(2)
    with client.multiplex("text") as stream:
        outputs = stream.step(sessions, "ab").outputs
        assert_close(outputs, np.stack([reference.predict("a")[0], reference.predict("b")[0]]))
        answer = stream.step(sessions, ["c", "?"])
        assert isinstance(answer.errors[sessions[1]], UnknownSymbol)
        assert_close(answer.outputs[0], reference.predict("ac")[1])


def test_a_model_of_words_reads_a_word_of_each_and_refuses_what_is_none_alone(client: Client, repository: Path) -> None:
    reference = Reference(repository / "words" / "1")
    sessions = names(4)
    with client.multiplex("words") as stream:
        outputs = stream.step(sessions, ["Film", "good,", "nobody", "bad"]).outputs
        expected = [reference.predict(word)[0] for word in ("film", "good", "(unknown)", "bad")]
        assert_close(outputs, np.stack(expected))
        answer = stream.step(sessions, ["is", "", "not bad", " bad "])
        assert isinstance(answer.errors[sessions[1]], StepsMissing)
        assert isinstance(answer.errors[sessions[2]], TooManySteps)
        assert_close(answer.outputs[0], reference.predict("film is")[1])
        assert_close(answer.outputs[3], reference.predict("bad bad")[1])


def test_steps_sent_ahead_are_answered_in_order_for_each_session(client: Client) -> None:
    sessions = names(3)
    found: dict[str, list[float]] = {name: [] for name in sessions}
    with client.multiplex("accumulator") as stream:
        for value in VALUES * 10:  # more than may be outstanding
            stream.send(sessions, column(value, 3))
        while answer := stream.receive():
            for name, step, output in zip(answer.sessions, answer.steps, answer.outputs, strict=True):
                assert step == len(found[name])
                found[name].append(float(output[0]))
    assert list(found.values()) == [[total for total, _ in accumulated(VALUES * 10)]] * 3


def test_receive_gives_nothing_where_nothing_is_to_come_or_not_in_time(client: Client) -> None:
    with client.multiplex("accumulator") as stream:
        assert stream.receive() is None
        assert stream.receive(timeout_s=0.01) is None


def test_answers_to_what_was_sent_ahead_are_not_lost_to_a_step(client: Client) -> None:
    a, b = names(2)
    with client.multiplex("accumulator") as stream:
        stream.send([a, b], [[1], [2]])
        assert stream.step([a], [[10]]).outputs[0, 0] == 11
        answered: dict[str, float] = {}
        while answer := stream.receive():
            answered |= zip(answer.sessions, answer.outputs[:, 0].tolist(), strict=True)
        assert answered == {a: 1, b: 2}


def test_a_refused_step_costs_its_neighbours_nothing_and_may_be_sent_again_corrected(client: Client) -> None:
    a, b = sessions = names(2)
    with client.multiplex("accumulator") as stream:
        answer = stream.step(sessions, np.array([[1], [NAN]]))
        assert (answer.outputs[0].tolist(), answer.steps.tolist(), answer.labels) == ([1, 0], [0, -1], (None, None))
        assert np.isnan(answer.outputs[1]).all()
        assert list(answer.errors) == [b]
        assert isinstance(answer.errors[b], NotFinite)
        assert (stream.next_step(a), stream.next_step(b)) == (1, 0)
        assert stream.step(sessions, [[1], [5]]).outputs[:, 0].tolist() == [2, 5]


def test_steps_sent_behind_a_refused_one_are_refused_too_and_nothing_is_applied_out_of_order(client: Client) -> None:
    (name,) = names(1)
    with client.multiplex("accumulator") as stream:
        stream.open([name])
        for value in (1.0, float("nan"), 2.0, 3.0):
            stream.send([name], np.array([[value]]))
        answers = list(iter(stream.receive, None))
        assert [output for answer in answers for output in answer.outputs[answer.steps >= 0, 0]] == [1]
        assert [type(error) for answer in answers for error in answer.errors.values()] == [NotFinite]
        assert stream.next_step(name) == 1
        assert stream.step([name], [[5]]).outputs[:, 0].tolist() == [6]


@pytest.mark.parametrize("x", [[[1.0]], [1.0, 2.0], "a", ["a"]])
def test_steps_that_do_not_fit_the_sessions_are_refused_here(client: Client, x: object) -> None:
    with client.multiplex("accumulator") as stream, pytest.raises(ShapeMismatch):
        stream.step(names(2), x)  # type: ignore[arg-type]


def test_a_session_named_twice_is_refused_here(client: Client) -> None:
    with client.multiplex("accumulator") as stream, pytest.raises(ValueError, match="twice"):
        stream.step(["a", "a"], column(1, 2))


def test_an_open_that_is_refused_raises_and_the_others_stay_open(client: Client) -> None:
    a, taken = names(2)
    with client.stream("accumulator", session=taken), client.multiplex("accumulator") as stream:
        with pytest.raises(SessionExists):
            stream.open([a, taken])
        answer = stream.step([a, taken], [[1], [1]])
        assert (answer.outputs[0, 0], list(answer.errors)) == (1, [taken])
        assert stream.sessions == [a]


def test_a_model_that_is_not_there_is_told_for_each_session(client: Client) -> None:
    with client.multiplex("nobody") as stream:
        with pytest.raises(ModelNotFound):
            stream.open(["a"])
        assert isinstance(stream.step(["a"], [[1]]).errors["a"], ModelNotFound)


def test_a_reset_begins_with_the_initial_state_and_counting_goes_on(client: Client) -> None:
    sessions = names(2)
    with client.multiplex("accumulator") as stream:
        stream.step(sessions, [[1], [2]])
        stream.reset(sessions[1:])
        answer = stream.step(sessions, [[10], [20]])
        assert (answer.outputs[:, 0].tolist(), answer.steps.tolist()) == ([11, 20], [1, 1])


def test_sessions_are_erased_once_the_block_ends_and_single_ones_before(client: Client) -> None:
    a, b = sessions = names(2)
    with client.multiplex("accumulator") as stream:
        stream.step(sessions, [[1], [2]])
        stream.close_sessions([a])
        assert stream.sessions == [b]
        with pytest.raises(SessionNotFound):
            client.session(a)
        assert client.session(b).next_step == 1
    with pytest.raises(SessionNotFound):
        client.session(b)
    assert stream.notices == []


def test_a_parked_stream_goes_on_from_its_resume_points(client: Client) -> None:
    a, _ = sessions = names(2)
    with client.multiplex("accumulator") as stream:
        stream.step(sessions, [[1], [2]])
        stream.send([a], [[10]])  # whose answer is missed
        points = [stream.resume_point(name) for name in sessions]
        stream.park()
    with client.multiplex("accumulator") as stream:
        stream.open(resume=points)
        missed = stream.receive()
        assert missed is not None
        assert (missed.sessions, missed.steps.tolist(), missed.outputs[:, 0].tolist()) == ((a,), [1], [11])
        answer = stream.step(sessions, [[100], [100]])
        assert (answer.outputs[:, 0].tolist(), answer.steps.tolist()) == ([111, 102], [2, 1])


def test_a_session_taken_over_or_deleted_ends_alone(client: Client) -> None:
    a, b, c = sessions = names(3)
    with client.multiplex("accumulator") as stream:
        stream.step(sessions, column(1, 3))
        with client.stream("accumulator", resume=stream.resume_point(a)) as other:
            client.delete_session(b)
            assert other.step([10]).output[0] == 11
            answer = stream.step(sessions, column(5, 3))
            assert {name: type(error) for name, error in answer.errors.items()} == {a: SessionMoved, b: SessionNotFound}
            assert answer.outputs[2, 0] == 6
            assert stream.sessions == [c]


def test_an_idle_session_is_opened_again_with_its_next_step(repository: Path) -> None:
    with start_server(repository, idle_timeout_s=0.3) as server, Client(server.target) as client:
        sessions = names(2)
        with client.multiplex("accumulator") as stream:
            stream.step(sessions, [[1], [2]])
            eventually(lambda: not any(session.live for session in client.sessions()))
            assert stream.step(sessions, [[10], [20]]).outputs[:, 0].tolist() == [11, 22]


def test_all_sessions_go_on_after_the_server_was_killed(repository: Path, tmp_path: Path) -> None:
    port, sessions = free_port(), names(20)
    settings: dict[str, Any] = {"port": port, "checkpoint_interval_s": 0.05}
    with Client(f"127.0.0.1:{port}") as client, ExitStack() as stack:
        with start_server(repository, tmp_path, **settings) as server:
            stream = stack.enter_context(client.multiplex("accumulator"))
            for index in range(3):
                stream.step(sessions, column(VALUES[index], 20))
            for index in range(3, 6):
                stream.send(sessions, column(VALUES[index], 20))
            server.kill()
        with start_server(repository, tmp_path, **settings):
            totals: dict[tuple[str, int], tuple[float, ...]] = {}
            while answer := stream.receive():
                assert not answer.errors
                keys = list(zip(answer.sessions, answer.steps.tolist(), strict=True))
                assert not totals.keys() & set(keys)
                totals |= dict(zip(keys, map(tuple, answer.outputs.tolist()), strict=True))
            assert totals == {(name, index): SUMS[index] for name in sessions for index in range(3, 6)}
            outputs = stream.step(sessions, column(VALUES[6], 20)).outputs
            assert set(map(tuple, outputs.tolist())) == {SUMS[6]}
            assert [notice.reason for notice in stream.notices] == ["interrupted", "resumed"]
            stream.close()
            assert client.sessions() == []


def test_sessions_that_died_with_their_server_are_told_each_and_new_ones_may_begin(repository: Path) -> None:
    port, sessions = free_port(), names(3)
    settings: dict[str, Any] = {"port": port, "session_store": "memory"}
    with Client(f"127.0.0.1:{port}") as client, ExitStack() as stack:
        with start_server(repository, **settings) as server:
            stream = stack.enter_context(client.multiplex("accumulator"))
            stream.step(sessions, column(1, 3))
            server.kill()
        with start_server(repository, **settings):
            answer = stream.step(sessions, column(2, 3))
            assert {type(error) for error in answer.errors.values()} == {SessionNotFound}
            assert len(answer.errors) == 3
            stream.open(sessions)
            assert stream.step(sessions, column(5, 3)).outputs[:, 0].tolist() == [5, 5, 5]
            stream.close()


def test_a_drained_server_is_left_and_the_next_one_goes_on(repository: Path, tmp_path: Path) -> None:
    port, sessions = free_port(), names(5)
    with Client(f"127.0.0.1:{port}") as client, ExitStack() as stack:
        with start_server(repository, tmp_path, port=port) as server:
            stream = stack.enter_context(client.multiplex("accumulator"))
            stream.step(sessions, column(VALUES[0], 5))
            server.terminate()
            assert server.process.wait(30) == 0
        with start_server(repository, tmp_path, port=port):
            outputs = stream.step(sessions, column(VALUES[1], 5)).outputs
            assert set(map(tuple, outputs.tolist())) == {SUMS[1]}
            assert [notice.reason for notice in stream.notices] == ["draining", "interrupted", "resumed"]
            stream.close()


def test_without_a_durable_store_a_durable_stream_is_refused(repository: Path) -> None:
    with (
        start_server(repository, session_store="memory") as server,
        Client(server.target) as client,
        client.multiplex("accumulator", durable=True) as stream,
        pytest.raises(StoreUnavailable),
    ):
        stream.open(["a"])


async def test_the_same_on_an_event_loop(server: RunningServer) -> None:
    a, b = sessions = names(2)
    async with AsyncClient(server.target) as client:
        async with client.multiplex("accumulator") as stream:
            assert (await stream.step(sessions, [[1], [2]])).outputs[:, 0].tolist() == [1, 2]
            await stream.send(sessions, [[10], [20]])
            answer = await stream.receive()
            assert answer is not None
            assert dict(zip(answer.sessions, answer.outputs[:, 0].tolist(), strict=True)) == {a: 11, b: 22}
            await stream.reset([a])
            assert (await stream.step(sessions, [[1], [2]])).outputs[:, 0].tolist() == [1, 24]
            assert await stream.receive(timeout_s=0.01) is None
            await stream.close_sessions([a])
            assert stream.sessions == [b]
            point: ResumePoint = stream.resume_point(b)
            await stream.park()
        async with client.multiplex("accumulator") as stream:
            await stream.open(resume=[point])
            assert (await stream.step([b], [[1]])).outputs[0, 0] == 25
        assert b not in [session.id for session in await client.sessions()]
