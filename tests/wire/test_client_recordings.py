"""Sequences of any length through the clients and the command line."""

import asyncio
import io
import itertools
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from rnnserve import AsyncClient, Client, MessageTooLarge, NotFinite, Prediction, RnnserveError, TooManySteps
from rnnserve.cli import outcome
from rnnserve.cli.app import app
from rnnserve.cli.bars import Bars
from rnnserve.tensors import Array, Input
from tests.support.bundles import WORDS
from tests.support.recordings import spilled_bytes
from tests.support.reference import Reference, assert_close
from tests.support.server import RunningServer, start_server
from tests.support.wire import eventually, random_steps
from tests.wire.test_predict_in_parts import Bulk, part, whole

LIMITS = {"max_message_bytes": 4_096, "max_sequence_steps": 100, "max_recording_steps": 60_000, "max_recordings": 2}
LONG = 50_000


@pytest.fixture(scope="module")
def spill_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spilled")


@pytest.fixture(scope="module")
def server(repository: Path, spill_dir: Path) -> Iterator[RunningServer]:
    """It takes so little at once that almost any sequence is long."""
    with start_server(repository, None, spill_dir=spill_dir, **LIMITS) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def recordings() -> list[Array]:
    return [random_steps(steps, seed=steps) for steps in (7, 450, 1_000, 101, 2_000, 333, 12)]


def check(predictions: list[Prediction], repository: Path) -> None:
    reference = Reference(repository / "stacked" / "1")
    for values, prediction in zip(recordings(), predictions, strict=True):
        assert_close(prediction.outputs, reference.predict(values))


def test_sequences_of_any_lengths_are_answered_in_their_order(client: Client, repository: Path) -> None:
    check(list(client.predict_many("stacked", recordings())), repository)


async def test_it_is_the_same_for_the_other_client(server: RunningServer, repository: Path) -> None:
    told: list[tuple[int, float]] = []

    async def inputs() -> AsyncIterator[Input]:
        for values in recordings():
            yield values

    async with AsyncClient(server.target) as client:
        results = client.predict_many("stacked", inputs(), on_progress=lambda *share: told.append(share))
        check([prediction async for prediction in results], repository)
    assert {index for index, share in told if share == 1.0} == {1, 2, 3, 4, 5}


TEXTS = [" ".join(random.Random(steps).choices(WORDS, k=steps)) for steps in (3, 450, 101, 2_000)]
TEXTS += ["good", "film " * 30 + "x" * 2_000 + " bad" * 200]


def check_words(predictions: list[Prediction], repository: Path) -> None:
    reference = Reference(repository / "words" / "1")
    for text, prediction in zip(TEXTS, predictions, strict=True):
        assert_close(prediction.outputs, reference.predict(text))


def test_long_texts_of_words_go_in_parts_of_whole_words(client: Client, repository: Path) -> None:
    check_words(list(client.predict_many("words", TEXTS, steps="all")), repository)


async def test_so_they_do_for_the_other_client(server: RunningServer, repository: Path) -> None:
    async with AsyncClient(server.target) as client:
        check_words([prediction async for prediction in client.predict_many("words", TEXTS, steps="all")], repository)


def test_a_file_is_sent_without_being_read_into_memory(client: Client, repository: Path, tmp_path: Path) -> None:
    values = random_steps(LONG // 2)
    np.save(tmp_path / "long.npy", values)
    told: list[float] = []
    (prediction,) = client.predict_many(
        "bidirectional",
        [np.load(tmp_path / "long.npy", mmap_mode="r")],
        probabilities=True,
        on_progress=lambda _, share: told.append(share),
    )
    assert_close(prediction.outputs, Reference(repository / "bidirectional" / "1").predict(values))
    assert prediction.probabilities is not None
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_long_texts_are_sequences_too(client: Client, repository: Path) -> None:
    text = "ab c" * 500
    (prediction,) = client.predict_many("text", [text], probabilities=True, top_k=1)
    assert_close(prediction.outputs, Reference(repository / "text" / "1").predict(text))
    assert prediction.probabilities is not None
    assert len(prediction.labels) == len(prediction.top) == len(prediction.probabilities) == len(text)


def test_a_long_sequence_that_is_refused_leaves_the_others_alone(client: Client) -> None:
    bad = random_steps(500)
    bad[321, 1] = np.nan
    inputs = [random_steps(500), bad, random_steps(60_001), random_steps(9)]
    first, second, third, fourth = client.predict_many("vanilla", inputs, errors="return")
    assert isinstance(first, Prediction)
    assert isinstance(second, NotFinite)
    assert (second.index, second.metadata["step"]) == (1, "321")
    assert isinstance(third, TooManySteps)
    assert third.metadata["limit"] == "60000"
    assert isinstance(fourth, Prediction)


def test_progress_is_a_sign_of_life(server: RunningServer) -> None:
    told = itertools.count(1)
    with grpc.insecure_channel(server.target) as channel, Client(server.target, timeout_s=2.0) as client:
        others = Bulk(channel, "stacked")
        others.send(*(part(number, 0, random_steps(3)) for number in range(2)), whole(2, random_steps(3)))
        others.until(lambda response: response.id == 2)  # now both places are taken

        def go_on_after_the_timeout(_: int, share: float) -> None:
            if share == 0 and next(told) == 15:  # four a second
                others.send(*(part(number, 3, random_steps(3), last=True) for number in range(2)))

        (prediction,) = client.predict_many("stacked", [random_steps(300)], on_progress=go_on_after_the_timeout)
        assert len(prediction.outputs) == 300
        assert next(told) > 15


def test_a_client_that_goes_leaves_nothing_on_the_server(server: RunningServer, spill_dir: Path) -> None:
    computing = threading.Event()

    def tell(_: int, share: float) -> None:
        if share > 0:
            computing.set()

    client = Client(server.target)
    results = client.predict_many("stacked", [random_steps(LONG)], on_progress=tell)

    def read() -> None:
        with suppress(RnnserveError):
            next(results)

    answers = threading.Thread(target=read)
    answers.start()
    assert computing.wait(30)
    assert spilled_bytes(spill_dir, server.lane_pid()) > 0
    client.close()
    eventually(lambda: spilled_bytes(spill_dir, server.lane_pid()) == 0)
    answers.join()


async def test_a_task_that_is_cancelled_leaves_nothing_on_the_server(server: RunningServer, spill_dir: Path) -> None:
    computing = asyncio.Event()

    async def predict(client: AsyncClient) -> None:
        def tell(_: int, share: float) -> None:
            if share > 0:
                computing.set()

        async for _ in client.predict_many("stacked", [random_steps(LONG)], on_progress=tell):
            raise AssertionError("it was cancelled")

    async with AsyncClient(server.target) as client:
        task = asyncio.create_task(predict(client))
        await computing.wait()
        task.cancel()
        await asyncio.wait([task])
        await asyncio.to_thread(eventually, lambda: spilled_bytes(spill_dir, server.lane_pid()) == 0)


@pytest.mark.parametrize(("steps", "kind"), [(101, TooManySteps), (400, MessageTooLarge)])
def test_predict_says_what_to_use_for_what_is_too_long(client: Client, steps: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="predict_many"):
        client.predict("stacked", [random_steps(steps)])


def test_the_command_predicts_a_long_file_with_a_bar(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(outcome, "stderr", Console(file=screen, force_terminal=True, width=100))
    header = "feature 0,feature 1,feature 2\n"
    np.savetxt(tmp_path / "hour.csv", random_steps(LONG), delimiter=",", header=header.strip(), comments="")
    (tmp_path / "bad.csv").write_text(header + "1,2,3\n" * 450 + "1,2,nan\n")

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["--target", server.target, "predict", *arguments])
        return done.exit_code, done.stdout

    code, printed = run("bidirectional", str(tmp_path / "hour.csv"))
    assert (code, printed.split("\t")[0] in {"yes", "no"}) == (0, True)
    assert "hour.csv" in screen.getvalue()
    code, printed = run("vanilla", str(tmp_path / "bad.csv"))
    assert (code, printed) == (1, "")
    assert f"{tmp_path / 'bad.csv'}, line 452" in screen.getvalue()


def test_a_sequence_is_counted_and_its_bar_gone_before_its_result_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(outcome, "stderr", Console(file=screen, force_terminal=True, width=100))

    def predictions(bars: Bars) -> Iterator[Prediction]:
        bars.show(0, 0.94)
        yield Prediction(np.zeros((1, 1), np.float32), (), None, ())

    with Bars.drawn(["hour.csv", "day.csv"]) as bars:
        next(bars.counted(predictions(bars)))
        drawn = screen.getvalue().rpartition("predicting")[2]
        assert "50%" in drawn
        assert "hour.csv" not in drawn
