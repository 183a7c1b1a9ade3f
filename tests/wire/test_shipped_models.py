"""Each bundle of the project, tried over the service on the samples that it ships."""

from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from models.bundle import load_bundle
from models.tasks import TASKS
from models.training.publish import REPOSITORY, samples_of
from rnnserve import Client, Quality
from rnnserve.cli.app import app
from tests.support.server import COMMITTED_REPOSITORY, start_server
from tests.support.wire_answers import WireAnswers


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with start_server(COMMITTED_REPOSITORY) as server:
        yield server.target


@pytest.fixture(scope="module")
def client(target: str) -> Iterator[Client]:
    with Client(target) as client:
        yield client


@pytest.mark.data  # pronunciations are compared with all ways to say a word
@pytest.mark.parametrize("name", TASKS)
def test_a_served_model_gives_the_metric_of_its_card_on_its_samples(client: Client, name: str) -> None:
    task, bundle = TASKS[name], load_bundle(REPOSITORY / name / "1")
    stated = bundle.manifest.on_samples
    assert stated is not None
    measured = task.measure(WireAnswers(client, name), task.items(samples_of(bundle)))[0]
    assert (measured.metric, measured.items) == (stated.metric, stated.items)
    one_wrong_item = 100 / stated.items if stated.metric.endswith("percent") else 1e-3
    assert measured.value == pytest.approx(stated.value, abs=one_wrong_item)


@pytest.mark.parametrize("name", TASKS)
def test_a_served_model_says_how_good_it_is_and_how_sure_that_is(client: Client, name: str) -> None:
    stated, told = load_bundle(REPOSITORY / name / "1").manifest.quality, client.model(name).quality
    assert stated.interval_95 is not None
    assert told == Quality(stated.metric, stated.value, stated.split, stated.items, stated.interval_95)


@pytest.mark.parametrize("command", [["predict", "diacritics", "--text"], ["stream", "diacritics-live"]])
def test_a_text_gets_its_marks_back(target: str, command: list[str]) -> None:
    typed = "Bugun hava cok guzel"
    given = [typed] if "--text" in command else []
    assert (
        CliRunner().invoke(app, ["--target", target, *command, *given], input=typed).stdout == "Bugün hava çok güzel\n"
    )
