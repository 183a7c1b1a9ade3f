"""Models, whole sequences and health of the blocking client against the real server."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from rnnserve import Client, InvalidArgument, ModelNotFound, RnnserveError, ShapeMismatch, StepsMissing, UnknownSymbol
from rnnserve.tensors import Array, Input
from tests.support.server import RunningServer


def recordings(count: int) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(1 + number % 7, 3)).astype(np.float32) for number in range(count)]


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


def test_all_models_are_listed(client: Client) -> None:
    listed = [(model.name, model.version) for model in client.models()]
    assert listed == [
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


def test_a_model_tells_what_it_is(client: Client) -> None:
    model = client.model("vanilla")
    assert (model.version, model.pattern, model.cell, model.direction) == (2, "many-to-one", "tanh", "forward")
    assert model.features == ("feature 0", "feature 1", "feature 2")
    assert model.labels == ("north", "east", "south", "west")
    assert (model.streamable, model.why_not_streamable, model.missing_values) == (True, "", "refuse")
    assert str(model) == "vanilla v2: many-to-one, tanh, 1 layer, forward, streamable"


def test_a_model_that_cannot_stream_tells_why(client: Client) -> None:
    model = client.model("bidirectional")
    assert not model.streamable
    assert "both ends" in model.why_not_streamable


def test_a_model_that_is_not_there_is_not_found(client: Client) -> None:
    for ask in (client.model, client.samples, client.health):
        with pytest.raises(ModelNotFound, match="nobody"):
            ask("nobody")
    with pytest.raises(ModelNotFound):
        client.model("vanilla", version=9)


def test_the_server_and_its_models_are_serving(client: Client) -> None:
    assert client.health() == "serving"
    assert client.health("bidirectional") == "serving"


def test_sequences_of_any_lengths_are_predicted_together_and_alone_alike(client: Client) -> None:
    inputs = recordings(5)
    together = client.predict("bidirectional", inputs, probabilities=True)
    for x, prediction in zip(inputs, together, strict=True):
        (alone,) = client.predict("bidirectional", [x])
        np.testing.assert_allclose(prediction.output, alone.output, atol=1e-5)
        assert prediction.probabilities is not None
        np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1.0, atol=1e-5)


def test_many_to_one_answers_about_the_last_step_unless_asked_about_all(client: Client) -> None:
    x = recordings(7)[6]
    (last,) = client.predict("vanilla", [x])
    (every,) = client.predict("vanilla", [x], steps="all")
    assert (last.outputs.shape, every.outputs.shape) == ((1, 4), (7, 4))
    np.testing.assert_allclose(last.output, every.output, atol=1e-6)
    assert (last.label, len(every.labels)) == (every.label, 7)


def test_texts_are_sequences(client: Client) -> None:
    (prediction,) = client.predict("text", ["ab c"], top_k=3)
    assert len(prediction.labels) == 4
    assert [len(top) for top in prediction.top] == [3] * 4


def test_one_text_for_a_list_of_texts_is_a_mistake(client: Client) -> None:
    with pytest.raises(TypeError, match="list"):
        client.predict("text", "abc")


def test_one_bad_sequence_refuses_the_message_and_is_named(client: Client) -> None:
    with pytest.raises(UnknownSymbol) as refusal:
        client.predict("text", ["a", "b", "x"])
    assert (refusal.value.field or "").startswith("sequences[2]")


def test_bulk_answers_come_in_the_order_of_the_inputs(client: Client) -> None:
    inputs = recordings(150)
    outputs = [prediction.output for prediction in client.predict_many("bidirectional", iter(inputs))]
    expected = [prediction.output for prediction in client.predict("bidirectional", inputs)]
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_bulk_reads_an_endless_input_only_as_far_as_allowed(client: Client) -> None:
    taken = itertools.count()
    endless = ([[1.0, 2.0, 3.0]] for _ in taken)
    results = client.predict_many("bidirectional", endless, ahead=8)
    assert len(list(itertools.islice(results, 20))) == 20
    assert next(taken) <= 20 + 8
    results.close()  # type: ignore[attr-defined]


def test_bulk_raises_at_the_bad_sequence_after_the_good_ones(client: Client) -> None:
    results = client.predict_many("text", ["a", "b", "x", "c"])
    assert len([next(results), next(results)]) == 2
    with pytest.raises(UnknownSymbol) as refusal:
        next(results)
    assert refusal.value.index == 2


def test_bulk_returns_errors_in_their_places_if_asked_to(client: Client) -> None:
    inputs: list[Input] = [[[1.0, 2.0, 3.0]], [[1.0]], [1.0, 2.0, 3.0], np.zeros((0, 3)), [[4.0, 5.0, 6.0]]]
    results = list(client.predict_many("vanilla", inputs, errors="return"))
    errors = {number: type(result) for number, result in enumerate(results) if isinstance(result, RnnserveError)}
    assert errors == {1: ShapeMismatch, 2: ShapeMismatch, 3: StepsMissing}
    assert len(results) == 5


def test_bulk_of_a_model_that_is_not_there_raises_even_where_errors_are_returned(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        list(client.predict_many("nobody", recordings(3), errors="return"))


def test_bulk_of_nothing_is_nothing(client: Client) -> None:
    assert list(client.predict_many("vanilla", [])) == []


def test_an_error_of_the_callers_own_comes_behind_the_answers(client: Client) -> None:
    def failing() -> Iterator[Array]:
        yield from recordings(3)
        raise KeyError("file")

    results = client.predict_many("vanilla", failing())
    assert len([next(results) for _ in range(3)]) == 3
    with pytest.raises(KeyError, match="file"):
        next(results)


def test_options_that_the_model_does_not_have_are_refused_by_field(client: Client) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        client.predict("stacked", recordings(1), probabilities=True)
    assert "probabilities" in (refusal.value.field or "")
    with pytest.raises(ValueError, match="steps"):
        client.predict("vanilla", recordings(1), steps="some")  # type: ignore[arg-type]
