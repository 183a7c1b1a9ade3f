from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from rnnserve.v1 import model_service_pb2 as pb
from rnnserve.v1.model_service_pb2_grpc import ModelServiceStub
from rnnserve.v1.tensor_pb2 import TEXT_UNIT_CHARACTER, TEXT_UNIT_WORD
from tests.support.bundles import LABELS, WORDS
from tests.support.reference import Reference
from tests.support.server import COMMITTED_REPOSITORY, RunningServer
from tests.support.wire import TIMEOUT_S, array, refusal_of

ALL = [
    ("accumulator", 1),
    ("ahead", 1),
    ("bidirectional", 1),
    ("stacked", 1),
    ("text", 1),
    ("text-ahead", 1),
    ("vanilla", 1),
    ("vanilla", 2),
    ("words", 1),
]


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[ModelServiceStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield ModelServiceStub(channel)


def pages(stub: ModelServiceStub, size: int) -> list[list[tuple[str, int]]]:
    found, token = [], ""
    while True:
        page = stub.ListModels(pb.ListModelsRequest(page_size=size, page_token=token), timeout=TIMEOUT_S)
        found.append([(model.name, model.version) for model in page.models])
        token = page.next_page_token
        if not token:
            return found


def model(stub: ModelServiceStub, name: str, version: int = 0) -> pb.Model:
    return stub.GetModel(pb.GetModelRequest(model=name, version=version), timeout=TIMEOUT_S).model


@pytest.mark.parametrize("size", [0, 9, 100, 4_000_000_000])
def test_all_models_come_on_one_page_by_name_and_version(stub: ModelServiceStub, size: int) -> None:
    assert pages(stub, size) == [ALL]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pages_hold_every_model_once_and_in_order(stub: ModelServiceStub, size: int) -> None:
    assert pages(stub, size) == [ALL[start : start + size] for start in range(0, len(ALL), size)]


@pytest.mark.parametrize("token", ["x", "-1", "10", "1.5", "9" * 5_000])
def test_a_token_that_no_page_gave_is_refused(stub: ModelServiceStub, token: str) -> None:
    with pytest.raises(grpc.RpcError) as ended:
        stub.ListModels(pb.ListModelsRequest(page_token=token), timeout=TIMEOUT_S)
    assert (refusal_of(ended.value).reason, refusal_of(ended.value).field) == ("FIELD_INVALID", "page_token")


def test_a_model_says_what_it_reads_and_answers(stub: ModelServiceStub, repository: Path) -> None:
    found = model(stub, "stacked")
    assert (found.cell, found.layers, found.transition_layers, found.hidden_size) == (pb.CELL_GRU, 2, 1, 8)
    assert (found.direction, found.streamable, found.why_not_streamable) == (pb.DIRECTION_FORWARD, True, "")
    assert list(found.features) == ["feature 0", "feature 1", "feature 2"]
    assert (found.outputs, list(found.labels), list(found.symbols)) == (2, [], [])
    assert found.missing_values == pb.MISSING_VALUES_HOLD_LAST
    assert found.pattern == pb.PATTERN_MANY_TO_MANY_ALIGNED
    reference = Reference(repository / "stacked" / "1")
    assert found.parameters == sum(weights.size for weights in reference.weights.values())
    assert found.weights_sha256 == reference.manifest["weights_sha256"]
    assert found.training_data.licence == "none"
    assert (found.quality.metric, found.quality.items) == ("none", 1)


def test_a_bidirectional_model_says_why_it_does_not_stream(stub: ModelServiceStub) -> None:
    found = model(stub, "bidirectional")
    assert (found.cell, found.direction, found.streamable) == (pb.CELL_LSTM, pb.DIRECTION_BIDIRECTIONAL, False)
    assert "both ends" in found.why_not_streamable


def test_a_text_model_names_its_symbols(stub: ModelServiceStub) -> None:
    found = model(stub, "text")
    assert (list(found.symbols), list(found.features), list(found.labels)) == (["a", "b", "c", " "], [], list(LABELS))
    assert found.missing_values == pb.MISSING_VALUES_UNSPECIFIED

    assert (found.text_unit, found.HasField("unknown_symbol"), found.fold_case) == (TEXT_UNIT_CHARACTER, False, False)
    assert found.symbol_count == 4


def test_a_model_of_words_says_what_it_does_not_know_and_is_listed_with_a_few_of_them(stub: ModelServiceStub) -> None:
    found = model(stub, "words")
    assert (found.text_unit, found.unknown_symbol, found.fold_case) == (TEXT_UNIT_WORD, "(unknown)", True)
    assert (tuple(found.symbols), found.symbol_count) == (WORDS, len(WORDS))
    listed = stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).models[-1]
    assert (tuple(listed.symbols), listed.symbol_count) == (WORDS[:256], len(WORDS))


def test_version_0_is_the_newest(stub: ModelServiceStub) -> None:
    assert [model(stub, "vanilla", version).version for version in (0, 1, 2)] == [2, 1, 2]


@pytest.mark.parametrize(
    ("name", "version", "field"), [("nobody", 0, "model"), ("", 0, "model"), ("vanilla", 3, "version")]
)
def test_a_model_that_is_not_served_is_not_found(stub: ModelServiceStub, name: str, version: int, field: str) -> None:
    requests = [
        (stub.GetModel, pb.GetModelRequest(model=name, version=version)),
        (stub.ListSamples, pb.ListSamplesRequest(model=name, version=version)),
    ]
    for method, request in requests:
        ask: Any = method
        with pytest.raises(grpc.RpcError) as ended:
            ask(request, timeout=TIMEOUT_S)
        assert ended.value.code() == grpc.StatusCode.NOT_FOUND
        assert (refusal_of(ended.value).reason, refusal_of(ended.value).field) == ("MODEL_NOT_FOUND", field)


def test_a_model_without_samples_lists_none(stub: ModelServiceStub) -> None:
    assert not stub.ListSamples(pb.ListSamplesRequest(model="vanilla"), timeout=TIMEOUT_S).samples


@pytest.mark.skipif(not COMMITTED_REPOSITORY.is_dir(), reason="no trained bundles yet")
def test_shipped_samples_come_as_their_model_reads_them(trained_server: RunningServer) -> None:
    with grpc.insecure_channel(trained_server.target) as channel:
        stub = ModelServiceStub(channel)
        models = stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).models
        for found in models:
            request = pb.ListSamplesRequest(model=found.name, version=found.version)
            samples = stub.ListSamples(request, timeout=TIMEOUT_S).samples
            assert len({sample.name for sample in samples}) == len(samples)
            for sample in samples:
                if found.features:
                    assert array(sample.tensor).shape[1] == len(found.features)
                else:
                    assert sample.text
                if found.labels and found.pattern in (pb.PATTERN_ONE_TO_ONE, pb.PATTERN_MANY_TO_ONE):
                    assert sample.label in found.labels
                assert sample.description
