"""Each bundle of the project, tried over the service on the samples that it ships."""

from collections.abc import Iterator

import pytest

from models.bundle import load_bundle
from models.tasks import TASKS
from models.training.publish import REPOSITORY, samples_of
from rnnserve import Client
from tests.support.server import COMMITTED_REPOSITORY, start_server
from tests.support.wire_answers import WireAnswers


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with start_server(COMMITTED_REPOSITORY) as server, Client(server.target) as client:
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
