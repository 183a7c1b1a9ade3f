"""Sequences that come in parts on a bulk stream."""

import itertools
import os
import queue
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from models.recurrent import NetworkSpec
from rnnserve.v1 import sequence_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from tests.support.bundles import LABELS, features, manifest, write_bundle, write_test_repository
from tests.support.recordings import spilled_bytes
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer, start_server
from tests.support.wire import (
    TIMEOUT_S,
    Refusal,
    array,
    eventually,
    metric,
    predict,
    random_steps,
    refusal_of,
    sequence,
)

Responses = dict[int, list[pb.PredictStreamResponse]]
LONG, HIDDEN_SIZE = 20_000, 96  # together a second of work
LONG_PARTS: dict[str, Any] = {"max_sequence_steps": LONG, "max_recording_steps": 3 * LONG}
LIMITS: dict[str, Any] = {**LONG_PARTS, "max_recordings": 2, "max_bulk_sequences": 4}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a bidirectional network that answers about each step."""
    repository = write_test_repository(tmp_path_factory.mktemp("repository"))
    spec = NetworkSpec(cell="lstm", direction="bidirectional", features=3, hidden_size=HIDDEN_SIZE, layers=2, outputs=4)
    wide = NetworkSpec(cell="tanh", features=3, hidden_size=2, outputs=1_000)
    write_bundle(repository, manifest("wide", wide, features(3)))
    write_bundle(repository, manifest("tagger", spec, features(3, missing_values="hold_last"), labels=LABELS))
    return repository


@pytest.fixture(scope="module")
def spill_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spilled")


@pytest.fixture(scope="module")
def server(repository: Path, spill_dir: Path) -> Iterator[RunningServer]:
    with start_server(repository, spill_dir=spill_dir, **LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


class Bulk:
    """A bulk stream, message by message."""

    def __init__(self, channel: grpc.Channel, model: str, **options: Any) -> None:
        self._requests: queue.SimpleQueue[pb.PredictStreamRequest | None] = queue.SimpleQueue()
        requests = iter(self._requests.get, None)
        self.call: Any = SequenceServiceStub(channel).PredictStream(requests, timeout=TIMEOUT_S)
        self.send(pb.PredictStreamRequest(open=pb.OpenPredictStream(model=model, options=OutputOptions(**options))))

    def send(self, *requests: pb.PredictStreamRequest) -> None:
        for request in requests:
            self._requests.put(request)

    def until(self, condition: Callable[[pb.PredictStreamResponse], bool]) -> pb.PredictStreamResponse:
        """The first response for which it holds; those before it are passed over."""
        response: pb.PredictStreamResponse = next(response for response in self.call if condition(response))
        return response

    def until_computing(self, number: int) -> None:
        """The client is told that this sequence is computed now."""
        self.until(lambda response: response.id == number and response.progress.total_steps > 0)

    def rest(self) -> Responses:
        """All other responses, by the id of their sequence."""
        self._requests.put(None)
        found: Responses = {}
        for response in self.call:
            found.setdefault(response.id, []).append(response)
        return found


def part(number: int, first_step: int, values: Any, *, last: bool = False) -> pb.PredictStreamRequest:
    sent = pb.Sequence() if values is None else sequence(values)
    return pb.PredictStreamRequest(part=pb.SequencePart(id=number, first_step=first_step, sequence=sent, last=last))


def parts(number: int, values: Any, *cuts: int) -> Iterator[pb.PredictStreamRequest]:
    bounds = [0, *cuts, len(values)]
    for begin, end in itertools.pairwise(bounds):
        yield part(number, begin, values[begin:end], last=end == len(values))


def whole(number: int, values: Any) -> pb.PredictStreamRequest:
    return pb.PredictStreamRequest(sequence=pb.IdentifiedSequence(id=number, sequence=sequence(values)))


def ask(channel: grpc.Channel, model: str, requests: Iterable[pb.PredictStreamRequest], **options: Any) -> Responses:
    bulk = Bulk(channel, model, **options)
    bulk.send(*requests)
    return bulk.rest()


def without_progress(responses: list[pb.PredictStreamResponse]) -> list[pb.PredictStreamResponse]:
    return [response for response in responses if response.WhichOneof("result") != "progress"]


def outputs(responses: list[pb.PredictStreamResponse]) -> NDArray[np.float32]:
    """Put together; the parts must say how they go together."""
    answers = without_progress(responses)
    assert {response.WhichOneof("result") for response in answers} == {"prediction"}, answers
    assert [response.more for response in answers] == [True] * (len(answers) - 1) + [False]
    rows = [array(response.prediction.outputs) for response in answers]
    first_steps = [response.first_step - answers[0].first_step for response in answers]
    assert first_steps == [0, *np.cumsum([len(row) for row in rows])[:-1].tolist()]
    return np.concatenate(rows)


def refusal(responses: list[pb.PredictStreamResponse]) -> Refusal:
    """The only answer."""
    (response,) = without_progress(responses)
    return Refusal(response.error)


def with_gaps(count: int) -> NDArray[np.float32]:
    values = random_steps(count)
    values[np.random.default_rng(1).random(values.shape) < 0.3] = np.nan
    values[98:103, 1] = np.nan  # across the cut of a test
    return values


@pytest.mark.parametrize("model", ["tagger", "stacked"])
def test_a_sequence_in_parts_is_answered_as_the_same_one_whole(
    channel: grpc.Channel, repository: Path, model: str
) -> None:
    values = with_gaps(9_000)
    found = ask(channel, model, [*parts(1, values, 100, 101, 6_000), whole(2, values)])
    assert len(without_progress(found[1])) > 1
    assert_close(outputs(found[1]), Reference(repository / model / "1").predict(values))
    assert_close(outputs(found[1]), outputs(found[2]))


def test_what_answers_once_answers_once(channel: grpc.Channel, repository: Path) -> None:
    values = random_steps(5_000)
    for model, folder, first_step in (("bidirectional", "bidirectional/1", 0), ("vanilla", "vanilla/2", 4_999)):
        (response,) = without_progress(ask(channel, model, parts(1, values, 700, 701))[1])
        assert (response.first_step, response.more) == (first_step, False)
        assert_close(array(response.prediction.outputs), Reference(repository / folder).predict(values)[-1:])


def test_options_hold_for_each_part_of_a_prediction(channel: grpc.Channel) -> None:
    text = "abc " * 2_000
    answers = without_progress(ask(channel, "text", parts(1, text, 3_000), probabilities=True, top_k=2, steps=1)[1])
    assert len(answers) > 1
    for response in answers:
        prediction = response.prediction
        steps = prediction.outputs.shape[0]
        assert array(prediction.probabilities).shape == (steps, 4)
        assert len(prediction.labels) == len(prediction.top) == steps
    (last,) = without_progress(ask(channel, "text", parts(1, text, 3_000), steps=2)[1])
    assert_close(array(last.prediction.outputs), array(answers[-1].prediction.outputs)[-1:])


def test_parts_and_whole_sequences_mix_on_a_stream(channel: grpc.Channel, repository: Path) -> None:
    values = {number: random_steps(40 + number, seed=number) for number in range(4)}
    left, right = parts(0, values[0], 20), parts(1, values[1], 30)
    requests = [whole(2, values[2]), next(left), next(right), whole(3, values[3]), *right, *left]
    found = ask(channel, "stacked", requests)
    assert found.keys() == values.keys()
    for number, value in values.items():
        assert_close(outputs(found[number]), Reference(repository / "stacked" / "1").predict(value))


def test_a_client_is_told_how_far_its_sequence_is(channel: grpc.Channel) -> None:
    found = ask(channel, "tagger", [*parts(1, random_steps(2 * LONG), LONG), whole(2, random_steps(3))])
    told = [response.progress for response in found[1] if response.WhichOneof("result") == "progress"]
    shares = [progress.computed_steps / progress.total_steps for progress in told if progress.total_steps]
    assert {progress.total_steps for progress in told} <= {0, 4 * 2 * LONG}
    assert shares == sorted(shares)
    assert any(0 < share < 1 for share in shares)
    assert not without_progress(found[1])[0].HasField("progress")
    assert len(found[2]) == 1


@pytest.mark.parametrize(
    ("requests", "reason", "field"),
    [
        ([part(1, 0, random_steps(3)), part(1, 4, random_steps(3))], "STEP_OUT_OF_ORDER", "part.first_step"),
        ([part(1, 0, random_steps(3)), part(1, 0, random_steps(3))], "STEP_OUT_OF_ORDER", "part.first_step"),
        ([part(1, 5, random_steps(3))], "STEP_OUT_OF_ORDER", "part.first_step"),
        ([part(1, 0, None)], "STEPS_MISSING", "part.sequence.input"),
        ([part(1, 0, random_steps(3)), part(1, 3, None, last=True)], "STEPS_MISSING", "part.sequence.input"),
        ([part(1, 0, random_steps(3)), part(1, 3, "abc")], "INPUT_KIND_MISMATCH", "part.sequence.text"),
        ([part(1, 0, random_steps(LONG + 1))], "TOO_MANY_STEPS", "part.sequence.tensor.shape"),
        (parts(1, random_steps(3 * LONG + 1), LONG, 2 * LONG, 3 * LONG), "TOO_MANY_STEPS", "part.sequence"),
    ],
)  # fmt: skip
def test_a_bad_sequence_in_parts_gets_one_error_and_leaves_the_others_alone(
    channel: grpc.Channel, requests: Iterable[pb.PredictStreamRequest], reason: str, field: str
) -> None:
    found = ask(channel, "stacked", [*requests, whole(2, random_steps(3))])
    assert (refusal(found[1]).reason, refusal(found[1]).field) == (reason, field)
    assert len(outputs(found[2])) == 3


def test_a_stream_that_ends_before_the_last_part_refuses_that_sequence(channel: grpc.Channel) -> None:
    found = ask(channel, "stacked", [part(1, 0, random_steps(3)), whole(2, random_steps(3))])
    assert (refusal(found[1]).reason, refusal(found[1]).field) == ("FIELD_INVALID", "part.last")
    assert "after 3 steps" in refusal(found[1]).message
    assert len(outputs(found[2])) == 3


@pytest.fixture
def impatient(repository: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """It has one place, and gives it to another soon."""
    with start_server(repository, spill_dir=tmp_path, part_timeout_s=0.3, max_recordings=1, **LONG_PARTS) as running:
        yield running


def test_a_sequence_whose_next_part_does_not_come_loses_its_place(impatient: RunningServer) -> None:
    with grpc.insecure_channel(impatient.target) as channel:
        silent, other = Bulk(channel, "stacked"), Bulk(channel, "stacked")
        silent.send(part(1, 0, random_steps(3)))
        eventually(lambda: metric(impatient.metrics_url, "rnnserve_recordings") == 1)
        other.send(*parts(1, random_steps(9), 4))
        overdue = silent.until(lambda response: response.HasField("error"))
        assert (overdue.id, Refusal(overdue.error).reason) == (1, "PART_OVERDUE")
        assert Refusal(overdue.error).metadata == {"limit": "0.3"}
        assert len(outputs(other.rest()[1])) == 9
        silent.send(part(1, 3, random_steps(3), last=True), whole(2, random_steps(3)))
        assert silent.rest().keys() == {2}
        eventually(lambda: metric(impatient.metrics_url, "rnnserve_recordings") == 0)


def test_what_else_a_stream_sends_does_not_keep_the_place(impatient: RunningServer) -> None:
    with grpc.insecure_channel(impatient.target) as channel:
        bulk = Bulk(channel, "stacked")
        bulk.send(part(0, 0, random_steps(3)))
        for number in itertools.count(1):  # one after the other, until the server has had enough
            bulk.send(whole(number, random_steps(3)))
            if bulk.until(lambda response: not response.HasField("progress")).id == 0:
                break


def test_a_client_that_does_not_read_its_prediction_loses_its_place(impatient: RunningServer) -> None:
    with grpc.insecure_channel(impatient.target) as channel, grpc.insecure_channel(impatient.target) as of_other:
        deaf, other = Bulk(channel, "wide"), Bulk(of_other, "stacked")
        deaf.send(*parts(1, random_steps(2 * LONG), LONG))  # 80 MB of prediction
        eventually(lambda: metric(impatient.metrics_url, "rnnserve_recordings") == 1)
        other.send(*parts(1, random_steps(9), 4))
        assert len(outputs(other.rest()[1])) == 9
        last = without_progress(deaf.rest()[1])[-1]
        assert Refusal(last.error).reason == "PART_OVERDUE"


def test_a_long_prediction_of_a_whole_sequence_comes_in_parts_too(channel: grpc.Channel, repository: Path) -> None:
    values = random_steps(LONG)
    found = ask(channel, "wide", [whole(1, values[:20]), whole(2, values)])
    assert len(found[1]) == 1
    assert len(found[2]) > 10
    assert_close(outputs(found[2]), Reference(repository / "wide" / "1").predict(values))


def test_a_prediction_that_is_too_long_for_one_response_is_refused_before_it_is_computed(
    channel: grpc.Channel,
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        SequenceServiceStub(channel).Predict(predict("wide", [random_steps(LONG)]), timeout=TIMEOUT_S)
    refusal = refusal_of(refused.value)
    assert (refusal.reason, refusal.field, refusal.metadata) == (
        "MESSAGE_TOO_LARGE",
        "sequences",
        {"limit": "67108864"},
    )


def test_a_refusal_names_the_step_in_the_whole_sequence(channel: grpc.Channel) -> None:
    values = random_steps(30)
    values[25, 2] = np.nan
    found = refusal(ask(channel, "vanilla", parts(1, values, 10, 20))[1])
    assert (found.reason, found.metadata) == ("NOT_FINITE", {"step": "25", "feature": "2"})
    assert "step 25 of the sequence" in found.message
    found = refusal(ask(channel, "text", parts(1, "abc x ", 2))[1])
    assert (found.reason, found.metadata) == ("UNKNOWN_SYMBOL", {"symbol": "x", "place": "4"})
    assert "character 4" in found.message


def test_what_comes_of_a_refused_sequence_is_passed_over_up_to_its_end_or_a_new_beginning(
    channel: grpc.Channel,
) -> None:
    wrong = [part(1, 0, random_steps(3)), part(1, 7, random_steps(3))]
    ended = [*wrong, part(1, 10, random_steps(3)), part(1, 13, random_steps(3), last=True)]
    first, second = without_progress(ask(channel, "stacked", [*ended, *parts(1, random_steps(9), 4)])[1])
    assert (first.WhichOneof("result"), second.WhichOneof("result")) == ("error", "prediction")
    first, second = without_progress(ask(channel, "stacked", [*wrong, *parts(1, random_steps(9), 4)])[1])
    assert (first.WhichOneof("result"), second.WhichOneof("result")) == ("error", "prediction")


def test_of_refused_sequences_that_never_end_no_more_are_passed_over_than_may_be_in_flight(
    channel: grpc.Channel,
) -> None:
    refused = [part(number, 7, random_steps(3)) for number in range(5)]
    ends = [part(number, 10, random_steps(3), last=True) for number in range(5)]
    found = ask(channel, "stacked", [*refused, *ends])
    assert [len(without_progress(found[number])) for number in range(5)] == [2, 1, 1, 1, 1]


def test_a_stream_that_ends_none_of_what_it_begins_is_told_when_there_are_too_many(channel: grpc.Channel) -> None:
    begun = [part(number, 0, random_steps(3)) for number in range(3)]
    ends = [part(number, 3, random_steps(3), last=True) for number in range(3)]
    found = ask(channel, "stacked", [*begun, *ends])
    assert (refusal(found[2]).reason, refusal(found[2]).metadata) == ("QUEUE_FULL", {"limit": "2"})
    assert [len(outputs(found[number])) for number in (0, 1)] == [6, 6]


def test_one_that_finds_no_place_waits_and_hears_that_it_does(channel: grpc.Channel) -> None:
    holding, waiting = Bulk(channel, "stacked"), Bulk(channel, "stacked")
    holding.send(*(part(number, 0, random_steps(3)) for number in range(2)), whole(2, random_steps(3)))
    holding.until(lambda response: response.id == 2)  # so that what was sent before it is there
    waiting.send(*parts(7, random_steps(9), 4))
    waiting.until(lambda response: response.HasField("progress") and response.progress.received_steps == 0)
    holding.send(*(part(number, 3, random_steps(3), last=True) for number in range(2)))
    assert len(outputs(waiting.rest()[7])) == 9
    assert holding.rest().keys() == {0, 1}


def test_a_cancelled_call_leaves_no_files(server: RunningServer, channel: grpc.Channel, spill_dir: Path) -> None:
    bulk = Bulk(channel, "tagger")
    bulk.send(part(2, 0, random_steps(9)), *parts(1, random_steps(2 * LONG), LONG))
    bulk.until_computing(1)
    assert spilled_bytes(spill_dir, server.lane_pid()) > 2 * LONG * 2 * HIDDEN_SIZE * 4
    bulk.call.cancel()
    eventually(lambda: spilled_bytes(spill_dir, server.lane_pid()) == 0)
    assert list(spill_dir.iterdir()) == []
    assert len(outputs(ask(channel, "tagger", parts(1, random_steps(9), 4))[1])) == 9


def test_a_call_cancelled_between_two_parts_gives_back_its_places_and_its_files(
    server: RunningServer, channel: grpc.Channel, spill_dir: Path
) -> None:
    holding, waiting = Bulk(channel, "stacked"), Bulk(channel, "stacked")
    holding.send(*(part(number, 0, random_steps(3)) for number in range(2)), whole(2, random_steps(3)))
    holding.until(lambda response: response.id == 2)  # so that what was sent before it is there
    waiting.send(*parts(7, random_steps(9), 4))
    waiting.until(lambda response: response.HasField("progress"))
    holding.call.cancel()
    assert len(outputs(waiting.rest()[7])) == 9
    eventually(lambda: metric(server.metrics_url, "rnnserve_recordings") == 0)
    eventually(lambda: spilled_bytes(spill_dir, server.lane_pid()) == 0)


def test_a_call_cancelled_while_its_whole_sequences_are_computed_gives_up_what_has_no_last_part(
    server: RunningServer, channel: grpc.Channel
) -> None:
    bulk = Bulk(channel, "tagger")
    bulk.send(part(1, 0, random_steps(9)), *(whole(number, random_steps(LONG)) for number in range(2, 7)))
    eventually(lambda: metric(server.metrics_url, "rnnserve_queued_sequences") == LIMITS["max_bulk_sequences"])
    bulk.call.cancel()
    eventually(lambda: metric(server.metrics_url, "rnnserve_recordings") == 0)


def test_a_worker_that_dies_loses_those_that_it_had_and_the_stream_goes_on(
    server: RunningServer, channel: grpc.Channel
) -> None:
    bulk = Bulk(channel, "tagger")
    bulk.send(part(2, 0, random_steps(9)), *parts(1, random_steps(2 * LONG), LONG))
    bulk.until_computing(1)
    os.kill(server.lane_pid(), signal.SIGKILL)
    lost = bulk.until(lambda response: response.HasField("error"))
    assert (lost.id, Refusal(lost.error).reason) == (1, "LANE_LOST")
    bulk.send(part(2, 9, random_steps(9)), part(2, 18, random_steps(9), last=True), *parts(3, random_steps(9), 4))
    found = bulk.rest()
    assert refusal(found[2]).reason == "LANE_LOST"
    assert len(outputs(found[3])) == 9


def test_it_is_all_the_same_where_several_processes_share_the_lane(repository: Path, tmp_path: Path) -> None:
    with (
        start_server(repository, spill_dir=tmp_path, workers=2, **LIMITS) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        values = with_gaps(9_000)
        found = ask(channel, "tagger", parts(1, values, 100, 6_000))
        assert_close(outputs(found[1]), Reference(repository / "tagger" / "1").predict(values))
        bulk = Bulk(channel, "tagger")
        bulk.send(*parts(1, random_steps(2 * LONG), LONG))
        bulk.until_computing(1)
        (lane,) = server.children("service.lane")
        assert spilled_bytes(tmp_path, lane) > 0
        bulk.call.cancel()
        eventually(lambda: spilled_bytes(tmp_path, lane) == 0)
        bulk = Bulk(channel, "tagger")
        bulk.send(*parts(1, random_steps(2 * LONG), LONG))
        bulk.until_computing(1)
        os.kill(lane, signal.SIGKILL)
        assert refusal(bulk.rest()[1]).reason == "LANE_LOST"
