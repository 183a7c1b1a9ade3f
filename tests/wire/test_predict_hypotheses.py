"""Encoder-decoders over the wire: whole sequences in, hypotheses of another length out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from rnnserve import (
    AsyncClient,
    Client,
    Decoding,
    FieldInvalid,
    MessageTooLarge,
    ModelNotStreamable,
    Prediction,
    UnknownSymbol,
)
from rnnserve.cli.app import app
from rnnserve.v1 import sequence_service_pb2 as pb
from rnnserve.v1.prediction_pb2 import Decoding as WireDecoding
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from tests.support.bundles import PHONES, write_speller, write_test_repository
from tests.support.reference import Reference
from tests.support.server import RunningServer, start_server
from tests.support.wire import TIMEOUT_S, Refusal

WORDS = ["abc", "a", "cab bac" * 5, " ", "bbbb"]
DECODINGS = [Decoding(), Decoding(beam_width=4, n_best=3, length_penalty=1.0), Decoding(beam_width=16, max_labels=5)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = write_test_repository(tmp_path_factory.mktemp("repository"))
    write_speller(repository)
    return repository


@pytest.fixture(scope="module", params=[1, 2])
def server(request: pytest.FixtureRequest, repository: Path) -> Iterator[RunningServer]:
    """Of one process, and of two workers with one lane."""
    with start_server(repository, workers=request.param, max_sequence_steps=100_000) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def check(predictions: list[Prediction], repository: Path, decoding: Decoding) -> None:
    """They are what plain torch.nn finds for the WORDS."""
    reference = Reference(repository / "speller" / "1")
    for word, prediction in zip(WORDS, predictions, strict=True):
        wanted = reference.write(
            word,
            beam_width=decoding.beam_width,
            length_penalty=decoding.length_penalty,
            max_labels=decoding.max_labels or 12,
        )[: decoding.n_best]
        assert [one.labels for one in prediction.hypotheses] == [
            tuple(PHONES[label] for label in one.labels) for one in wanted
        ]
        assert [one.score for one in prediction.hypotheses] == pytest.approx([one.score for one in wanted], abs=1e-4)
        assert prediction.labels == prediction.hypotheses[0].labels


@pytest.mark.parametrize("decoding", DECODINGS)
def test_each_sequence_is_answered_by_its_hypotheses_the_best_first(
    client: Client, repository: Path, decoding: Decoding
) -> None:
    check(client.predict("speller", WORDS, decoding=decoding), repository, decoding)
    check(list(client.predict_many("speller", WORDS, decoding=decoding)), repository, decoding)


async def test_it_is_the_same_for_the_other_client(server: RunningServer, repository: Path) -> None:
    async with AsyncClient(server.target) as client:
        check(await client.predict("speller", WORDS, decoding=DECODINGS[1]), repository, DECODINGS[1])
        many = [one async for one in client.predict_many("speller", WORDS, decoding=DECODINGS[1])]
        check(many, repository, DECODINGS[1])


def test_without_a_word_about_decoding_it_is_greedy(client: Client, repository: Path) -> None:
    check(client.predict("speller", WORDS), repository, Decoding())


def test_attention_says_what_each_label_was_written_about(client: Client) -> None:
    (prediction,) = client.predict("speller", ["abcab"], decoding=Decoding(beam_width=2, n_best=2, attention=True))
    assert len(prediction.hypotheses) == 2
    for hypothesis in prediction.hypotheses:
        assert hypothesis.attention is not None
        assert hypothesis.attention.shape == (len(hypothesis.labels), 5)
        np.testing.assert_allclose(hypothesis.attention.sum(axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("decoding", "field", "limit"),
    [
        (Decoding(beam_width=17), "beam_width", "16"),
        (Decoding(n_best=2), "n_best", "1"),
        (Decoding(beam_width=3, n_best=4), "n_best", "3"),
        (Decoding(max_labels=13), "max_labels", "12"),
        (Decoding(length_penalty=2.1), "length_penalty", "2.0"),
        (Decoding(length_penalty=-0.1), "length_penalty", "2.0"),
        (Decoding(length_penalty=float("nan")), "length_penalty", "2.0"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_name_and_limit(
    client: Client, decoding: Decoding, field: str, limit: str
) -> None:
    with pytest.raises(FieldInvalid) as refusal:
        client.predict("speller", ["abc"], decoding=decoding)
    assert (refusal.value.field, refusal.value.metadata) == (f"options.decoding.{field}", {"limit": limit})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"steps": "all"}, "steps"),
        ({"probabilities": True}, "probabilities"),
        ({"top_k": 1}, "top_k"),
        ({"threshold": 0.5}, "threshold"),
    ],
)
def test_what_only_other_models_give_is_refused(client: Client, options: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldInvalid) as refusal:
        client.predict("speller", ["abc"], **options)
    assert refusal.value.field == f"options.{field}"


def test_an_answer_that_might_be_too_large_is_refused_before_it_is_searched_for_and_the_others_are_answered(
    client: Client, server: RunningServer
) -> None:
    long, limit = "abc " * 22_000, {"limit": "67108864"}
    with pytest.raises(MessageTooLarge, match="the answer might have") as refused:
        client.predict("speller", ["abc ", long], decoding=Decoding(beam_width=16, attention=True))
    assert (refused.value.field, refused.value.metadata) == ("options.decoding.attention", limit)
    options = OutputOptions(decoding=WireDecoding(beam_width=16, attention=True))
    requests = [pb.PredictStreamRequest(open=pb.OpenPredictStream(model="speller", options=options))]
    for number, text in enumerate(["abc", long, "cab"]):
        item = pb.IdentifiedSequence(id=number, sequence=pb.Sequence(text=text))
        requests.append(pb.PredictStreamRequest(sequence=item))
    with grpc.insecure_channel(server.target) as channel:
        answers = list(SequenceServiceStub(channel).PredictStream(iter(requests), timeout=TIMEOUT_S))
    found = {answer.id: answer for answer in answers}
    assert [found[number].WhichOneof("result") for number in range(3)] == ["prediction", "error", "prediction"]
    assert (Refusal(found[1].error).reason, Refusal(found[1].error).metadata) == ("MESSAGE_TOO_LARGE", limit)


def test_an_output_that_is_cut_says_so(client: Client) -> None:
    for most in (1, 12):
        (prediction,) = client.predict("speller", ["abc"], decoding=Decoding(beam_width=4, n_best=4, max_labels=most))
        assert {one.is_cut for one in prediction.hypotheses if len(one.labels) < most} <= {False}
        assert {one.is_cut for one in prediction.hypotheses if len(one.labels) == most} <= {True}


def test_a_model_tells_how_much_it_writes_and_whether_it_attends(client: Client) -> None:
    model = client.model("speller")
    assert (model.max_labels, model.attention, model.labels[0]) == (12, True, PHONES[0])
    assert (client.model("text").max_labels, client.model("text").attention) == (0, False)


def test_other_models_do_not_decode(client: Client) -> None:
    with pytest.raises(FieldInvalid, match="no encoder-decoder") as refusal:
        client.predict("text", ["abc"], decoding=Decoding())
    assert refusal.value.field == "options.decoding"


def test_a_bad_sequence_leaves_the_others_of_its_stream_alone(client: Client) -> None:
    found = list(client.predict_many("speller", ["abc", "xyz", "cab"], errors="return"))
    assert [isinstance(one, Prediction) for one in found] == [True, False, True]
    assert isinstance(found[1], UnknownSymbol)


def test_it_does_not_stream(client: Client) -> None:
    with pytest.raises(ModelNotStreamable, match="reads the whole sequence before it writes"):
        client.stream("speller").open()


def test_it_takes_no_sequence_in_parts(client: Client, server: RunningServer) -> None:
    requests = [
        pb.PredictStreamRequest(open=pb.OpenPredictStream(model="speller")),
        pb.PredictStreamRequest(part=pb.SequencePart(id=7, sequence=pb.Sequence(text="abc"), last=True)),
    ]
    with grpc.insecure_channel(server.target) as channel:
        (answer,) = SequenceServiceStub(channel).PredictStream(iter(requests), timeout=TIMEOUT_S)
    assert (answer.id, Refusal(answer.error).reason, Refusal(answer.error).field) == (7, "FIELD_INVALID", "part")


def test_the_command_prints_hypotheses(server: RunningServer, repository: Path) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments, env={"RNNSERVE_TARGET": server.target})
        assert done.exit_code == 0, done.output
        return done.stdout

    wanted = Reference(repository / "speller" / "1").write("abc", beam_width=3, length_penalty=0.0, max_labels=12)
    best = [" ".join(PHONES[label] for label in one.labels) for one in wanted]
    lines = run("predict", "speller", "--text", "abc", "--beam", "3", "--n-best", "2").splitlines()
    assert [line.split("\t")[0] for line in lines] == best[:2]
    found = json.loads(run("--json", "predict", "speller", "--text", "abc", "--beam", "3"))
    (hypothesis,) = found["hypotheses"]
    assert hypothesis["labels"] == best[0].split()
    assert hypothesis["score"] == pytest.approx(wanted[0].score, abs=1e-4)
