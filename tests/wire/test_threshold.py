"""What a model is less sure of than the caller wants is left out of the answers, the same in every call."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest

from rnnserve import Answer, AsyncClient, BatchAnswer, Client, Prediction
from rnnserve.results import TopLabel
from rnnserve.tensors import Array
from rnnserve.v1.prediction_pb2 import OutputOptions
from tests.support.multiplexed import multiplexed, step_each
from tests.support.server import RunningServer
from tests.support.wire import live_stream, open_, random_steps, steps

VALUES = random_steps(40)
LONG = random_steps(700)
TOKEN = b"0123456789abcdef"


class Said(NamedTuple):
    """About each of some steps."""

    labels: list[str | None]
    top: list[tuple[TopLabel, ...]]
    outputs: Array
    probabilities: Array

    @classmethod
    def by(cls, answers: Iterable[Answer]) -> "Said":
        labels, top, outputs, probabilities = zip(
            *((a.label, a.top, a.output, a.probabilities) for a in answers), strict=True
        )
        return cls(list(labels), list(top), np.stack(outputs), np.stack(probabilities))

    @classmethod
    def by_rows(cls, predictions: Iterable[Prediction | BatchAnswer]) -> "Said":
        labels, top, outputs, probabilities = zip(
            *((p.labels, p.top, p.outputs, p.probabilities) for p in predictions), strict=True
        )
        return cls([*chain(*labels)], [*chain(*top)], np.concatenate(outputs), np.concatenate(probabilities))


Call = Callable[..., Said]


def step_by_step(client: Client, model: str, values: Array, **options: Any) -> Said:
    with client.stream(model, **options) as stream:
        return Said.by(stream.step(step) for step in values)


def step_by_step_with_labels(client: Client, **options: Any) -> Said:
    return step_by_step(client, "vanilla", VALUES, **options)


def in_messages_of_many(client: Client, **options: Any) -> Said:
    with client.stream("vanilla", **options) as stream:
        return Said.by(stream.steps([VALUES[:15], VALUES[15:]]))


def missed_and_resumed(client: Client, **options: Any) -> Said:
    """What a stream that asked for nothing is told again by one that does."""
    stream = client.stream("vanilla")
    stream.open()
    point = stream.resume_point
    stream.step(VALUES)
    stream.abort()
    with client.stream("vanilla", resume=point, **options) as again:
        return Said.by(again.missed)


def of_many_sessions(client: Client, **options: Any) -> Said:
    with client.multiplex("vanilla", **options) as gateway:
        sessions = ["unsure-a", "unsure-b", "unsure-c", "unsure-d"]
        return Said.by_rows(gateway.step(sessions, rows) for rows in VALUES.reshape(-1, 4, 3))


def whole(client: Client, **options: Any) -> Said:
    return Said.by_rows(client.predict("vanilla", [VALUES], steps="all", **options))


def many_whole(client: Client, **options: Any) -> Said:
    return Said.by_rows(client.predict_many("vanilla", [VALUES[:15], VALUES[15:]], steps="all", **options))


def in_parts(client: Client, **options: Any) -> Said:
    return Said.by_rows(client.predict_many("vanilla", [LONG], steps="all", **options))


CALLS: list[Call] = [
    step_by_step_with_labels,
    in_messages_of_many,
    missed_and_resumed,
    of_many_sessions,
    whole,
    many_whole,
    in_parts,
]


def middle(probabilities: Array) -> float:
    """A threshold that some of the best labels reach, as far from all of them as may be."""
    best = np.sort(probabilities.max(axis=1))
    inner = best[len(best) // 4 : -len(best) // 4]
    place = int(np.diff(inner).argmax())
    return float(inner[place : place + 2].mean())


def check(call: Callable[[float], Said]) -> None:
    everything = call(0)
    threshold = middle(everything.probabilities)
    sure = call(threshold)
    is_sure = (everything.probabilities.max(axis=1) >= threshold).tolist()
    assert set(is_sure) == {True, False}
    assert sure.labels == [label if kept else None for label, kept in zip(everything.labels, is_sure, strict=True)]
    assert [[label for label, _ in top] for top in sure.top] == [
        [label for label, probability in top if probability >= threshold] for top in everything.top
    ]
    np.testing.assert_allclose(sure.outputs, everything.outputs, atol=1e-6)
    np.testing.assert_allclose(sure.probabilities, everything.probabilities, atol=1e-6)


@pytest.fixture
def client(small_server: RunningServer) -> Iterator[Client]:
    with Client(small_server.target) as client:
        yield client


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.replace("_", " "))
def test_less_probable_labels_are_left_out_and_all_else_stays(client: Client, call: Call) -> None:
    check(lambda threshold: call(client, probabilities=True, top_k=3, threshold=threshold))


def test_a_trained_model_speaks_up_in_a_stream_once_it_is_sure(trained_server: RunningServer) -> None:
    with Client(trained_server.target) as client:
        (sample, *_) = client.samples("speaker")
        assert not isinstance(sample.input, str)
        values = sample.input
        check(lambda threshold: step_by_step(client, "speaker", values, probabilities=True, threshold=threshold))
        with client.stream("speaker", threshold=0.9) as stream:
            labels = [answer.label for answer in stream.steps(values)]
    assert (labels[0], labels[-1]) == (None, sample.label)


def test_a_trained_model_says_about_a_whole_sequence_only_what_it_is_sure_of(trained_server: RunningServer) -> None:
    with Client(trained_server.target) as client:
        sequences = [sample.input for sample in client.samples("speaker-bidirectional")]
        sequences += [sequence[:2] for sequence in sequences]  # of which it is less sure

        def predicted(threshold: float) -> Said:
            options: dict[str, Any] = {"probabilities": True, "threshold": threshold}
            return Said.by_rows(client.predict("speaker-bidirectional", sequences, **options))

        check(predicted)


async def test_the_other_client_asks_for_it_in_all_its_calls(small_server: RunningServer) -> None:
    async with AsyncClient(small_server.target) as client:
        async with client.stream("vanilla", threshold=1) as stream:
            assert (await stream.step(VALUES[0])).label is None
        async with client.multiplex("vanilla", threshold=1) as gateway:
            assert (await gateway.step(["other-a", "other-b"], VALUES[:2])).labels == (None, None)
        (prediction,) = await client.predict("vanilla", [VALUES], threshold=1)
        (of_many,) = [one async for one in client.predict_many("vanilla", [VALUES], threshold=1)]
        assert prediction.label is of_many.label is None


@pytest.fixture
def channel(small_server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(small_server.target) as channel:
        yield channel


def test_steps_that_are_sent_again_are_answered_the_same(client: Client, channel: grpc.Channel) -> None:
    threshold = middle(whole(client, probabilities=True).probabilities)
    opening = open_("vanilla", "unsure-again", token=TOKEN, top_k=3, threshold=threshold)
    with live_stream(channel, opening) as stream:
        first, again = (stream.ask(steps(0, VALUES)).answer.prediction for _ in range(2))
    assert "" in first.labels
    assert first == again


def test_a_step_of_many_sessions_that_is_sent_again_is_answered_the_same(channel: grpc.Channel) -> None:
    with multiplexed(channel) as call:
        call.open(0, "vanilla", "unsure-handle", token=TOKEN, options=OutputOptions(top_k=3, threshold=1))
        first, again = (call.ask(step_each({0: 0}, VALUES[:1])).answer.prediction for _ in range(2))
    assert list(first.labels) == [""]
    assert first == again
