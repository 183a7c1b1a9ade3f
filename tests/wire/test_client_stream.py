"""Real-time streams of the blocking client against the real server."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rnnserve import (
    Answer,
    Client,
    InputKindMismatch,
    ModelNotFound,
    ModelNotStreamable,
    NotFinite,
    SessionExists,
    ShapeMismatch,
    StepsMissing,
    StreamClosed,
)
from rnnserve.tensors import Array
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer


def recording(steps: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(steps, 3)).astype(np.float32)


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def whole(client: Client, x: Array) -> Array:
    """(steps, outputs): what the same network says about the whole sequence."""
    return client.predict("vanilla", [x], steps="all")[0].outputs


def test_step_by_step_gives_what_the_whole_sequence_gives(client: Client) -> None:
    x = recording(20)
    with client.stream("vanilla") as stream:
        answers = [stream.step(reading) for reading in x]
    assert [answer.step for answer in answers] == list(range(20))
    np.testing.assert_allclose([answer.output for answer in answers], whole(client, x), atol=1e-5)


def test_sent_ahead_and_in_chunks_it_gives_the_same(client: Client) -> None:
    x = recording(30)
    with client.stream("vanilla") as stream:
        answers = list(
            stream.steps(
                [
                    x[0],
                    x[1:2],
                    x[2:9],
                    x[9:],
                ]
            )
        )
    assert [answer.step for answer in answers] == list(range(30))
    np.testing.assert_allclose([answer.output for answer in answers], whole(client, x), atol=1e-5)


def test_a_step_of_several_answers_about_the_last(client: Client) -> None:
    x = recording(5)
    with client.stream("vanilla") as stream:
        answer = stream.step(x)
        assert (answer.step, stream.next_step) == (4, 5)
        np.testing.assert_allclose(answer.output, whole(client, x)[-1], atol=1e-5)


def test_a_stream_about_last_steps_answers_once_for_each_input(client: Client) -> None:
    x = recording(6)
    with client.stream("vanilla", steps="last") as stream:
        assert [answer.step for answer in stream.steps([x[:2], x[2:5], x[5]])] == [1, 4, 5]


def test_an_answer_carries_what_was_asked_for(client: Client) -> None:
    with client.stream("vanilla", probabilities=True, top_k=2) as stream:
        answer = stream.step(recording(1)[0])
    assert answer.probabilities is not None
    assert answer.probabilities.sum() == pytest.approx(1.0)
    assert answer.top[0].label == answer.label
    assert answer.top[0].probability == pytest.approx(answer.probabilities.max())
    with client.stream("vanilla") as stream:
        answer = stream.step(recording(1)[0])
    assert (answer.probabilities, answer.top) == (None, ())


def test_a_model_without_labels_gives_none(client: Client) -> None:
    with client.stream("stacked") as stream:
        assert stream.step(recording(1)[0]).label is None


def test_text_is_streamed_by_the_character(client: Client) -> None:
    with client.stream("text") as stream:
        answers = list(stream.steps("ab ca"))
    assert tuple(answer.label for answer in answers) == client.predict("text", ["ab ca"])[0].labels


def test_text_is_streamed_by_the_word_however_it_is_cut(client: Client, repository: Path) -> None:
    text = "The film is  NOT good, or\nso they say"
    expected = Reference(repository / "words" / "1").predict(text)
    with client.stream("words") as stream:
        answers = [stream.step("The"), stream.step("film is"), *stream.steps([" NOT good,\t", "or"])]
        answers += stream.steps("so they say")
    assert [answer.step for answer in answers] == [0, 2, *range(3, 9)]
    assert_close(np.stack([answer.output for answer in answers]), expected[[0, *range(2, 9)]])


def test_a_text_without_a_word_is_refused_and_costs_nothing(client: Client) -> None:
    with client.stream("words") as stream:
        with pytest.raises(StepsMissing):
            stream.step(" \n")
        assert stream.step("film").step == 0


def test_a_reset_forgets_the_steps_and_goes_on_counting(client: Client) -> None:
    x = recording(3)
    with client.stream("vanilla") as stream:
        before = [answer.output for answer in stream.steps(x)]
        stream.reset()
        after = list(stream.steps(x))
    np.testing.assert_array_equal(before, [answer.output for answer in after])
    assert [answer.step for answer in after] == [3, 4, 5]


def test_a_refused_step_changes_nothing_and_can_be_sent_again(client: Client) -> None:
    x = recording(3)
    with client.stream("vanilla") as stream:
        stream.step(x[0])
        with pytest.raises(NotFinite) as refusal:
            stream.step([1.0, float("nan"), 1.0])
        with pytest.raises(ShapeMismatch):
            stream.step([1.0, 2.0])
        with pytest.raises(InputKindMismatch):
            stream.step("a")
        answers = [stream.step(reading) for reading in x[1:]]
    assert (refusal.value.field or "").startswith("steps.tensor")
    assert [answer.step for answer in answers] == [1, 2]
    np.testing.assert_allclose([answer.output for answer in answers], whole(client, x)[1:], atol=1e-5)


def test_ahead_the_answers_before_a_refused_step_come_and_the_stream_goes_on(client: Client) -> None:
    x = recording(12)
    broken = x.copy()
    broken[6] = np.inf
    answers: list[Answer] = []
    with client.stream("vanilla") as stream:
        with pytest.raises(NotFinite):
            answers.extend(stream.steps(broken))  # what `extend` took stays, whatever comes after it
        assert stream.next_step == 6
        answers += stream.steps(x[6:])
    assert [answer.step for answer in answers][-6:] == list(range(6, 12))
    np.testing.assert_allclose(answers[-1].output, whole(client, x)[-1], atol=1e-5)


def test_ahead_an_error_of_the_callers_own_comes_behind_the_answers(client: Client) -> None:
    def failing() -> Iterator[Array]:
        yield from recording(5)
        raise KeyError("sensor")

    with client.stream("vanilla") as stream:
        answers = stream.steps(failing())
        steps = [next(answers).step for _ in range(5)]
        with pytest.raises(KeyError, match="sensor"):
            next(answers)
        assert stream.step(recording(1)[0]).step == 5
    assert steps == list(range(5))


def test_ahead_no_answer_waits_for_the_next_input(client: Client) -> None:
    answered = threading.Event()

    def sensor() -> Iterator[Array]:
        yield recording(1)[0]
        assert answered.wait(10), "the answer was held back"
        yield recording(1)[0]

    with client.stream("vanilla") as stream:
        for _ in stream.steps(sensor(), ahead=8):
            answered.set()
        assert stream.next_step == 2


def test_ahead_no_more_inputs_are_read_than_allowed(client: Client) -> None:
    taken = itertools.count()

    def endless() -> Iterator[Array]:
        while True:
            next(taken)
            yield recording(1)[0]

    with client.stream("vanilla") as stream:
        answers = stream.steps(endless(), ahead=4)
        for _ in range(20):
            next(answers)
        assert next(taken) <= 20 + 4


def test_steps_left_half_way_leave_the_stream_usable(client: Client) -> None:
    with client.stream("vanilla") as stream:
        for answer in stream.steps(recording(100), ahead=16):
            if answer.step == 3:
                break
        following = stream.step(recording(1)[0])
        assert 4 <= following.step <= 3 + 16 + 1
        assert following.step == stream.next_step - 1


def test_steps_that_another_call_has_ended_say_so(client: Client) -> None:
    with client.stream("vanilla") as stream:
        answers = stream.steps(recording(100))
        next(answers)
        stream.reset()
        with pytest.raises(RuntimeError, match="another call"):
            list(answers)
        stream.step(recording(1)[0])


def test_nothing_may_go_ahead_of_nothing(client: Client) -> None:
    with client.stream("vanilla") as stream, pytest.raises(ValueError, match="ahead"):
        list(stream.steps(recording(3), ahead=0))


def test_a_session_id_is_free_again_once_its_stream_is_closed(client: Client) -> None:
    with client.stream("vanilla", session="pump-7") as first:
        assert first.session == "pump-7"
        with pytest.raises(SessionExists), client.stream("vanilla", session="pump-7"):
            pass
        first.step(recording(1)[0])
    with client.stream("vanilla", session="pump-7") as again:
        assert again.step(recording(1)[0]).step == 0


def test_a_network_that_reads_both_ways_is_refused_with_the_reason(client: Client) -> None:
    with pytest.raises(ModelNotStreamable, match="both ends") as refusal, client.stream("bidirectional"):
        pass
    assert (refusal.value.code, refusal.value.metadata["model"]) == ("FAILED_PRECONDITION", "bidirectional")


@pytest.mark.parametrize(("model", "version"), [("nobody", 0), ("vanilla", 99)])
def test_a_model_that_is_not_there_is_refused(client: Client, model: str, version: int) -> None:
    with pytest.raises(ModelNotFound), client.stream(model, version=version):
        pass


def test_the_version_that_was_asked_for_answers(client: Client) -> None:
    x = recording(1)[0]
    outputs = []
    for version in (0, 1, 2):
        with client.stream("vanilla", version=version) as stream:
            outputs.append(stream.step(x).output)
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert not np.allclose(outputs[1], outputs[2])


def test_a_stream_outside_of_its_block_says_so(client: Client) -> None:
    stream = client.stream("vanilla")
    with pytest.raises(StreamClosed):
        stream.step(recording(1)[0])
    with stream:
        stream.step(recording(1)[0])
    with pytest.raises(StreamClosed):
        stream.step(recording(1)[0])
    stream.close()


def test_threads_may_share_a_client(client: Client) -> None:
    def listen(seed: int) -> Array:
        with client.stream("vanilla") as stream:
            return [answer.output for answer in stream.steps(recording(30, seed))][-1]

    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(listen, range(8)))
    expected = [whole(client, recording(30, seed))[-1] for seed in range(8)]
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
