from collections.abc import Iterator

import pytest

from models.manifest import Manifest, ModelKey
from models.recurrent import NetworkSpec
from service.engine.step_engine import StepEngine
from service.errors import ModelNotStreamable, SessionExists, SessionLimit
from service.sessions.registry import SessionRegistry
from tests.support.bundles import features, manifest
from tests.support.fakes import CountingMetrics, FakeExecutor

MODEL = ModelKey("vanilla", 1)


def described(**network: object) -> Manifest:
    spec = NetworkSpec.model_validate({"cell": "tanh", "features": 3, "hidden_size": 2, "outputs": 2} | network)
    return manifest("vanilla", spec, features(3))


@pytest.fixture
def metrics() -> CountingMetrics:
    return CountingMetrics()


@pytest.fixture
def registry(metrics: CountingMetrics) -> Iterator[SessionRegistry]:
    engine = StepEngine({MODEL: FakeExecutor()}, max_tick_sessions=1, metrics=metrics)
    yield SessionRegistry(engine, max_sessions=2, metrics=metrics)
    engine.close()


def test_a_session_begins_at_step_zero(registry: SessionRegistry) -> None:
    session = registry.open("a", described())
    assert (session.session_id, session.model, session.next_step) == ("a", MODEL, 0)


def test_an_id_in_use_is_never_taken_over(registry: SessionRegistry) -> None:
    registry.open("a", described())
    with pytest.raises(SessionExists) as refusal:
        registry.open("a", described())
    assert refusal.value.metadata == {"session_id": "a"}


def test_an_id_is_free_again_once_its_session_is_closed(registry: SessionRegistry) -> None:
    first = registry.open("a", described())
    registry.close(first)
    assert registry.open("a", described()) is not first


def test_one_session_over_the_limit_is_refused_until_another_closes(registry: SessionRegistry) -> None:
    first = registry.open("a", described())
    registry.open("b", described())
    with pytest.raises(SessionLimit) as refusal:
        registry.open("c", described())
    assert refusal.value.metadata == {"limit": "2"}
    assert refusal.value.retry_after_s
    registry.close(first)
    registry.open("c", described())


@pytest.mark.parametrize(
    ("network", "reason"), [({"direction": "bidirectional"}, "both ends"), ({"readout": "mean"}, "mean over all steps")]
)
def test_a_network_that_needs_the_whole_sequence_is_refused_with_the_reason(
    registry: SessionRegistry, metrics: CountingMetrics, network: dict[str, object], reason: str
) -> None:
    with pytest.raises(ModelNotStreamable, match=reason):
        registry.open("a", described(**network))
    assert metrics.events == []


def test_sessions_are_counted_as_they_come_and_go(registry: SessionRegistry, metrics: CountingMetrics) -> None:
    session = registry.open("a", described())
    with pytest.raises(SessionExists):
        registry.open("a", described())
    registry.close(session)
    assert metrics.events == [("opened", MODEL), ("closed", MODEL)]
