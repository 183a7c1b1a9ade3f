"""Outputs of one-to-many models: over the contract, and with the client."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from models.bundle import load_bundle
from models.sampling import log_probabilities
from rnnserve import (
    AsyncClient,
    Client,
    Draining,
    FieldInvalid,
    GeneratedSymbol,
    ModelInUse,
    ModelNotFound,
    ModelNotGenerative,
    QueueFull,
    RetryPolicy,
    RnnserveError,
    TooManySteps,
    UnknownSymbol,
)
from rnnserve.v1.real_time_service_pb2 import GenerateRequest
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from tests.support.bundles import CHORDS, write_accumulator, write_chorale, write_composer
from tests.support.server import RunningServer, start_server
from tests.support.wire import TIMEOUT_S, Refusal, eventually, metric, refusal_of

pytestmark = pytest.mark.xdist_group("generate")

COMPOSER, ENDLESS = ({"model": name, "version": "1"} for name in ("composer", "endless"))
SYMBOLS = "abcdefg."
NEVER_AGAIN = RetryPolicy(attempts=1)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composers")
    write_composer(folder)
    write_composer(folder, "endless", end=None, max_symbols=100_000)
    write_accumulator(folder)
    write_chorale(folder)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[RunningServer]:
    with start_server(repository, max_generations=12, max_steps_per_message=100, drain_timeout_s=60) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target, retry=NEVER_AGAIN) as client:
        yield client


def running(server: RunningServer) -> float:
    """How many outputs are being written."""
    return metric(server.metrics_url, "rnnserve_generations", **ENDLESS)


@contextmanager
def written_meanwhile(server: RunningServer, count: int) -> Iterator[None]:
    """So many outputs that have no end, and as many streams, keep the server busy in the block."""
    stop = threading.Event()

    def stream() -> None:
        with Client(server.target) as client, client.stream("endless") as stream:
            while not stop.is_set():
                stream.step("abc")

    def write() -> None:
        with Client(server.target) as client, client.generate("endless") as output:
            for _ in output:
                if stop.is_set():
                    return

    with ThreadPoolExecutor(2 * count) as threads:
        tasks = [threads.submit(work) for work in (stream, write) for _ in range(count)]
        try:
            eventually(lambda: running(server) >= count)
            yield
        finally:
            stop.set()
        for task in tasks:
            task.result(TIMEOUT_S)


def test_a_model_tells_how_it_writes(client: Client) -> None:
    model = client.model("composer")
    assert (model.pattern, model.max_symbols, model.start_symbol, model.end_symbol) == ("one-to-many", 500, ".", ".")
    assert client.model("endless").end_symbol is None
    assert client.model("accumulator").max_symbols == 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_seed_writes_the_same(client: Client, deterministic: bool) -> None:
    def written(seed: int | None) -> tuple[list[GeneratedSymbol], int | None]:
        output = client.generate("endless", "abc", seed=seed, max_symbols=200, deterministic=deterministic)
        return list(output), output.seed

    symbols, seed = written(7)
    assert seed == 7
    assert len(symbols) == 200
    if deterministic:
        assert written(7)[0] == symbols
    assert written(8)[0] != symbols
    unseeded, picked = written(None)
    assert unseeded != symbols
    assert [symbol.text for symbol in written(picked)[0]] == [symbol.text for symbol in unseeded]


def test_a_deterministic_output_is_the_same_to_the_last_bit_whatever_else_is_computed(
    server: RunningServer, client: Client
) -> None:
    def written() -> list[GeneratedSymbol]:
        return list(client.generate("endless", "ab" * 20, seed=3, max_symbols=600, deterministic=True, alternatives=8))

    alone = written()
    with written_meanwhile(server, 5):
        assert written() == alone
        assert written() == alone


def test_what_is_told_of_each_symbol_is_what_the_whole_network_says(client: Client, repository: Path) -> None:
    predictor = load_bundle(repository / "composer" / "1").predictor
    output = client.generate("endless", "gfe", seed=1, max_symbols=100, temperature=2.0, alternatives=8)
    symbols = list(output)
    read = [SYMBOLS.index(symbol) for symbol in ".gfe" + output.text]
    with torch.no_grad():
        said = predictor.run(torch.tensor([read[:-1]]), torch.tensor([len(read) - 1]))[0].numpy()
    for symbol, number, logits in zip(symbols, read[4:], said[3:], strict=True):
        expected = log_probabilities(logits)
        assert symbol.log_probability == pytest.approx(expected[number], abs=1e-4)
        assert [alternative.label for alternative in symbol.top] == [SYMBOLS[i] for i in np.argsort(-expected)]
        assert symbol.top[0].probability == pytest.approx(np.exp(expected.max()), abs=1e-4)


def test_without_temperature_each_symbol_is_the_most_probable_one(client: Client) -> None:
    outputs = [client.generate("endless", "a", temperature=0, max_symbols=50, alternatives=1) for _ in range(2)]
    for output in outputs:
        assert all(symbol.text == symbol.top[0].label for symbol in output)
    assert outputs[0].text == outputs[1].text
    assert outputs[0].seed != outputs[1].seed


def test_filters_leave_only_the_most_probable_symbols(client: Client) -> None:
    for symbol in client.generate("endless", temperature=10, top_k=2, max_symbols=100, alternatives=2):
        assert symbol.text in {alternative.label for alternative in symbol.top}
    for symbol in client.generate("endless", top_p=1e-6, max_symbols=100, alternatives=1):
        assert symbol.text == symbol.top[0].label


def test_an_output_ends_where_the_model_ends_it(client: Client) -> None:
    output = client.generate("composer", seed=5)
    symbols = list(output)
    assert (output.finish, output.stop) == ("end", None)
    assert "." not in output.text
    assert output.text == "".join(symbol.text for symbol in symbols)
    assert [symbol.step for symbol in symbols] == list(range(len(symbols)))
    assert output.end_log_probability is not None
    assert output.end_log_probability < 0


def test_an_output_ends_with_a_stop_text_which_is_part_of_it(client: Client) -> None:
    output = client.generate("endless", stop=["dd", "ga"], temperature=10)
    list(output)
    assert (output.finish, output.stop) == ("stop", output.text[-2:])
    assert output.stop in {"dd", "ga"}
    assert not {"dd", "ga"} & {output.text[i : i + 2] for i in range(len(output.text) - 2)}


def test_an_output_ends_where_it_is_as_long_as_it_may_be(client: Client) -> None:
    output = client.generate("endless", max_symbols=3)
    assert (len(list(output)), output.finish, output.end_log_probability) == (3, "max_symbols", None)


def test_a_prompt_is_read_and_not_repeated(client: Client) -> None:
    prompted = client.generate("endless", "abcdefg" * 10, temperature=0, max_symbols=30)
    other = client.generate("endless", "gfedcba" * 10, temperature=0, max_symbols=1, alternatives=8)
    first = next(client.generate("endless", "abcdefg" * 10, temperature=0, max_symbols=1, alternatives=8))
    assert len(list(prompted)) == 30
    assert next(other).top != first.top


def test_words_are_symbols_too(client: Client) -> None:
    output = client.generate("chorale", f"  {CHORDS[1]}\tS67 ", max_symbols=7)
    words = [symbol.text for symbol in output]
    assert [word[0] for word in words] == list("ATBSATB")
    assert output.text == " ".join(words)
    output = client.generate("chorale", stop=["A64 T57", "A62 T59"])
    list(output)
    assert output.text.endswith(output.stop or "nothing")
    with pytest.raises(UnknownSymbol) as refusal:
        next(client.generate("chorale", "S67 A99"))
    assert (refusal.value.field, refusal.value.metadata["symbol"], refusal.value.metadata["place"]) == (
        "prompt", "A99", "1",
    )  # fmt: skip
    with pytest.raises(TooManySteps):
        next(client.generate("chorale", "S67 " * 101))


def test_a_composer_streams_and_predicts_as_any_other_model(client: Client) -> None:
    (whole,) = client.predict("composer", [".abc"])
    assert whole.outputs.shape == (4, 8)
    with client.stream("composer") as stream:
        outputs = [stream.step(symbol).output for symbol in ".abc"]
    np.testing.assert_allclose(outputs, whole.outputs, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], type[RnnserveError], str, str | None]] = {
    "temperature": ({"temperature": 10.5}, FieldInvalid, "temperature", "10"),
    "no number": ({"temperature": float("nan")}, FieldInvalid, "temperature", "10"),
    "cold": ({"temperature": -0.1}, FieldInvalid, "temperature", "10"),
    "top_k": ({"top_k": 9}, FieldInvalid, "top_k", "8"),
    "no top_p": ({"top_p": 0.0}, FieldInvalid, "top_p", "1"),
    "top_p": ({"top_p": 1.01}, FieldInvalid, "top_p", "1"),
    "alternatives": ({"alternatives": 9}, FieldInvalid, "alternatives", "8"),
    "max_symbols": ({"max_symbols": 501}, FieldInvalid, "max_symbols", "500"),
    "unknown symbol": ({"prompt": "abXc"}, UnknownSymbol, "prompt", None),
    "long prompt": ({"prompt": "a" * 101}, TooManySteps, "prompt", "100"),
    "stops": ({"stop": ["a"] * 17}, FieldInvalid, "stop", "16"),
    "empty stop": ({"stop": ["a", ""]}, FieldInvalid, "stop[1]", None),
    "long stop": ({"stop": ["a" * 65]}, TooManySteps, "stop[0]", "64"),
    "unknown stop": ({"stop": ["ab", "x"]}, UnknownSymbol, "stop[1]", None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_out_of_bounds_is_refused_by_field_and_limit(client: Client, name: str) -> None:
    given, kind, field, limit = REFUSED[name]
    with pytest.raises(kind) as refusal:
        next(client.generate("composer", **given))
    assert (refusal.value.field, refusal.value.metadata.get("limit")) == (field, limit)


def test_an_unknown_symbol_of_a_prompt_is_told_with_its_place(client: Client) -> None:
    with pytest.raises(UnknownSymbol) as refusal:
        next(client.generate("composer", "abXc"))
    assert (refusal.value.metadata["symbol"], refusal.value.metadata["place"]) == ("X", "2")


def test_a_model_that_does_not_write_says_so(server: RunningServer, client: Client) -> None:
    with pytest.raises(ModelNotGenerative, match="many-to-many aligned"):
        next(client.generate("accumulator"))
    with pytest.raises(ModelNotFound):
        next(client.generate("nobody"))
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as ended:
        list(RealTimeServiceStub(channel).Generate(GenerateRequest(model="accumulator"), timeout=TIMEOUT_S))
    refusal = refusal_of(ended.value)
    assert (ended.value.code(), refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_GENERATIVE")
    assert refusal.precondition


def test_a_request_that_says_nothing_gets_what_the_model_says(server: RunningServer) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = RealTimeServiceStub(channel)
        first, *symbols, last = stub.Generate(GenerateRequest(model="composer"), timeout=TIMEOUT_S)
        assert (first.started.model, first.started.version) == ("composer", 1)
        assert [response.symbol.index for response in symbols] == list(range(last.finished.symbols))
        again = GenerateRequest(model="composer", seed=first.started.seed, temperature=1.0, top_p=1.0, max_symbols=500)
        assert list(stub.Generate(again, timeout=TIMEOUT_S)) == [first, *symbols, last]


def test_an_output_that_is_left_ends_on_the_server(server: RunningServer, client: Client) -> None:
    before = metric(server.metrics_url, "rnnserve_generations_ended_total", **ENDLESS, finish="broken_off")
    for symbol in client.generate("endless"):
        if symbol.step == 5:
            break
    with client.generate("endless") as output:
        next(output)
        assert running(server) >= 1
    output.close()
    assert list(output) == []
    eventually(lambda: running(server) == 0)
    ended = metric(server.metrics_url, "rnnserve_generations_ended_total", **ENDLESS, finish="broken_off")
    assert ended == before + 2
    symbols = metric(server.metrics_url, "rnnserve_generated_symbols_total", **ENDLESS)
    time.sleep(0.1)  # in which it would write some two hundred
    assert metric(server.metrics_url, "rnnserve_generated_symbols_total", **ENDLESS) == symbols


def test_outputs_are_counted_by_their_end(server: RunningServer, client: Client) -> None:
    def counted() -> list[float]:
        ends = [
            metric(server.metrics_url, "rnnserve_generations_ended_total", **COMPOSER, finish=finish)
            for finish in ("end", "stop", "max_symbols")
        ]
        return [*ends, metric(server.metrics_url, "rnnserve_generated_symbols_total", **COMPOSER)]

    before = counted()
    symbols = len(list(client.generate("composer", seed=5)))
    list(client.generate("composer", max_symbols=1, temperature=0, stop=["c", "a", "b", "d", "e", "f", "g"]))
    list(client.generate("composer", max_symbols=1, temperature=0))
    eventually(lambda: sum(counted()[:3]) == sum(before[:3]) + 3)
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 1, 1, symbols + 2]


def test_more_outputs_at_once_than_may_be_are_refused_and_may_be_tried_again(server: RunningServer) -> None:
    refusals = metric(server.metrics_url, "rnnserve_refusals_total", reason="QUEUE_FULL")
    with (
        Client(server.target, retry=NEVER_AGAIN) as client,
        Client(server.target, retry=RetryPolicy(attempts=20)) as patient,
        ThreadPoolExecutor(1) as thread,
    ):
        eventually(lambda: running(server) == 0)
        outputs = [client.generate("endless") for _ in range(12)]
        for output in outputs:
            next(output)
        with pytest.raises(QueueFull) as refusal:
            next(client.generate("endless"))
        assert (refusal.value.retry_after_s, refusal.value.metadata["limit"]) == (1.0, "12")
        waiting = thread.submit(lambda: list(patient.generate("composer", seed=1)))
        eventually(lambda: metric(server.metrics_url, "rnnserve_refusals_total", reason="QUEUE_FULL") >= refusals + 2)
        for output in outputs:
            output.close()
        assert waiting.result(TIMEOUT_S) == list(client.generate("composer", seed=1))


async def test_on_an_event_loop_it_is_the_same(server: RunningServer, client: Client) -> None:
    expected = list(client.generate("composer", "ab", seed=9, deterministic=True))
    async with AsyncClient(server.target) as loop_client:
        output = loop_client.generate("composer", "ab", seed=9, deterministic=True)
        assert [symbol async for symbol in output] == expected
        assert (output.seed, output.finish, output.text) == (9, "end", "".join(symbol.text for symbol in expected))
        async with loop_client.generate("endless") as endless:
            await anext(endless)
        with pytest.raises(UnknownSymbol):
            await anext(loop_client.generate("composer", "?"))
    eventually(lambda: running(server) == 0)


def test_live_streams_go_on_beside_outputs(server: RunningServer, client: Client) -> None:
    with written_meanwhile(server, 5), client.stream("accumulator") as stream:
        assert [stream.step([1.0]).output[0] for _ in range(100)] == list(range(1, 101))


def test_a_model_that_writes_is_unloaded_only_if_its_outputs_may_be_broken_off(repository: Path) -> None:
    with start_server(repository) as server, Client(server.target, retry=NEVER_AGAIN) as client:
        output = client.generate("endless")
        next(output)
        with pytest.raises(ModelInUse) as refusal:
            client.unload_model("endless")
        assert refusal.value.metadata["streams"] == "1"
        next(output)
        client.unload_model("endless", end_streams=True)
        with pytest.raises(ModelNotFound, match="unloaded"):
            list(output)
        with pytest.raises(ModelNotFound):
            next(client.generate("endless"))
        client.load_model("endless")
        assert next(client.generate("endless", "a")).step == 0
        assert "Traceback" not in server.log()


def test_a_drain_lets_outputs_end_and_begins_none(repository: Path) -> None:
    with start_server(repository, drain_timeout_s=60) as server, Client(server.target, retry=NEVER_AGAIN) as client:
        output = client.generate("endless", max_symbols=3_000)
        next(output)
        server.terminate()
        eventually(lambda: "draining for" in server.log())
        with pytest.raises(Draining):
            next(client.generate("composer"))
        assert len(list(output)) == 2_999
        assert output.finish == "max_symbols"
        assert server.process.wait(TIMEOUT_S) == 0
        assert "Traceback" not in server.log()


def test_an_output_that_is_too_long_for_a_drain_is_broken_off_with_a_reason(repository: Path) -> None:
    with start_server(repository, drain_timeout_s=0.5) as server, Client(server.target, retry=NEVER_AGAIN) as client:
        output = client.generate("endless")
        next(output)
        server.terminate()
        with pytest.raises(Draining) as refusal:
            list(output)
        assert refusal.value.retry_after_s
        assert output.finish is None
        assert server.process.wait(TIMEOUT_S) == 0
        assert "Traceback" not in server.log()


def test_an_output_that_nobody_reads_is_broken_off(repository: Path) -> None:
    options = [("grpc.http2.bdp_probe", 0)]  # or the transport would take some megabytes, read or not
    with (
        start_server(repository, idle_timeout_s=0.5) as server,
        grpc.insecure_channel(server.target, options) as channel,
    ):
        request = GenerateRequest(model="endless", alternatives=8)
        call = RealTimeServiceStub(channel).Generate(request, timeout=TIMEOUT_S)
        next(iter(call))
        eventually(lambda: metric(server.metrics_url, "rnnserve_refusals_total", reason="EVICTED") == 1)
        assert running(server) == 0
        with pytest.raises(grpc.RpcError) as ended:
            list(call)
        refusal: Refusal = refusal_of(ended.value)
        assert (refusal.reason, refusal.metadata["limit"]) == ("EVICTED", "idle_timeout_s")


def test_workers_have_no_more_outputs_together_than_may_be(repository: Path, tmp_path: Path) -> None:
    with start_server(repository, tmp_path, workers=2, max_generations=3) as server:
        clients = [Client(server.target, retry=NEVER_AGAIN) for _ in range(8)]  # of both workers, as good as always
        outputs = [client.generate("endless") for client in clients]
        refused = 0
        for output in outputs:
            try:
                next(output)
            except QueueFull:
                refused += 1
            time.sleep(0.5)  # so long the workers may take to hear of each other
        assert refused == 5
        for client in clients:
            client.close()
