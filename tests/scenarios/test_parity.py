"""Streamed outputs equal the whole sequence in plain `torch.nn`, or by the equations in NumPy, however it is cut."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.bundle import Bundle, load_manifest
from models.manifest import TextInput
from models.recurrent import NetworkSpec
from rnnserve import Client
from rnnserve.texts import text_of, text_steps
from rnnserve.v1 import model_service_pb2 as models_pb
from rnnserve.v1.model_service_pb2_grpc import ModelServiceStub
from rnnserve.v1.prediction_pb2 import STEP_SELECTION_ALL, STEP_SELECTION_UNSPECIFIED
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from service.engine.executor import TorchExecutor
from service.engine.step_engine import StepEngine
from service.sessions.record import SessionKey, SessionRecord
from service.sessions.session import Session
from tests.support.fakes import CountingMetrics, FakeStream
from tests.support.networks import SYMBOLS, look_aheads, numeric_specs, random_bundle, seeds, specs
from tests.support.reference import NumpyNetwork, Reference, State, assert_close
from tests.support.server import COMMITTED_REPOSITORY, RunningServer
from tests.support.wire import TIMEOUT_S, array, live_stream, open_, predict

Array = NDArray[Any]


def random_values(spec: NetworkSpec, count: int, rng: np.random.Generator) -> Array | str:
    """For numeric networks with a hole here and there."""
    if spec.symbols:
        return "".join(rng.choice(SYMBOLS, count))
    values = rng.normal(size=(count, spec.features or 0)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    return values


def as_inputs(bundle: Bundle, values: Array | str) -> Array:
    spec = bundle.manifest.input
    return spec.encode(values) if isinstance(values, str) and isinstance(spec, TextInput) else np.asarray(values)


def cut(values: Any, rng: np.random.Generator) -> list[Any]:
    """Into chunks of random lengths."""
    places = sorted(rng.choice(np.arange(1, len(values)), size=rng.integers(0, len(values)), replace=False).tolist())
    return [values[start:end] for start, end in zip([0, *places], [*places, len(values)], strict=True)]


async def stream_all(bundle: Bundle, sequences: list[Array], max_tick_sessions: int, seed: int) -> list[Array]:
    """Every sequence in a session of its own, in random chunks, some of which are cancelled and sent again."""
    engine = StepEngine(
        {bundle.manifest.key: TorchExecutor(bundle.predictor)},
        max_tick_sessions=max_tick_sessions,
        metrics=CountingMetrics(),
    )

    async def stream(number: int, inputs: Array) -> Array:
        rng = np.random.default_rng((seed, number))
        key = bundle.manifest.key
        record = SessionRecord(SessionKey("", str(number)), key, "0" * 64, b"", 0, 0, engine.initial_row(key))
        padding = bundle.manifest.padding
        session = Session(record, engine, CountingMetrics(), max_held_bytes=0, clock=time.time, padding=padding)
        stream, outputs = FakeStream(), []
        session.take(stream, 0)
        for chunk in cut(inputs, rng):
            for _ in range(rng.integers(4)):
                await asyncio.sleep(0)
            if rng.random() < 0.2:
                interrupted = asyncio.create_task(session.apply(stream, session.next_step, chunk))
                await asyncio.sleep(0)
                interrupted.cancel()
                await asyncio.wait([interrupted])
            applied = await session.apply(stream, session.next_step, chunk)
            assert applied.failure is None
            outputs.append(applied.outputs)
        if session.ends_with_answers(session.next_step):
            outputs.append((await session.end_sequence(stream)).outputs)
        return np.concatenate(outputs)

    try:
        return await asyncio.gather(*(stream(number, inputs) for number, inputs in enumerate(sequences)))
    finally:
        engine.close()


@settings(max_examples=40, deadline=None)
@given(
    spec=specs,
    seed=seeds,
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    max_tick_sessions=st.integers(1, 4),
    look_ahead=look_aheads,
)
def test_however_random_networks_are_streamed_they_answer_as_over_the_whole_sequence(
    spec: NetworkSpec, seed: int, lengths: list[int], max_tick_sessions: int, look_ahead: int
) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, "hold_last", seed, look_ahead=look_ahead)
        reference = Reference(bundle.folder)
        sequences = [random_values(spec, length, rng) for length in lengths]
        inputs = [as_inputs(bundle, values) for values in sequences]
        streamed = asyncio.run(stream_all(bundle, inputs, max_tick_sessions, seed))
        for values, outputs in zip(sequences, streamed, strict=True):
            assert_close(outputs, reference.predict(values))


@settings(max_examples=40, deadline=None)
@given(spec=numeric_specs, seed=seeds, scale=st.sampled_from([2.0, 4.0]))
def test_networks_that_amplify_errors_answer_right_from_equal_states(
    spec: NetworkSpec, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, "refuse", seed, scale)
        executor, reference = TorchExecutor(bundle.predictor), Reference(bundle.folder)
    equations = NumpyNetwork(reference.manifest["network"], reference.weights)
    rows = np.zeros((1, executor.row_size), np.float32)
    for _ in range(10):
        values = rng.normal(size=(1, spec.features or 0)).astype(np.float32)
        wanted, state = equations.step(reference.normalised(values)[0], state_of(rows[0], spec))
        outputs, rows = executor.step(values, rows)
        largest = max(1.0, np.abs(wanted).max(), np.abs(rows).max())
        assert_close(outputs[0] / largest, wanted / largest)
        assert_close(rows[0] / largest, np.concatenate([value for layer in state for value in layer]) / largest)


def state_of(row: Array, spec: NetworkSpec) -> State:
    values = 2 if spec.cell == "lstm" else 1
    return [tuple(layer) for layer in row.astype(np.float64).reshape(spec.layers, values, spec.hidden_size)]


BUNDLES = sorted(file.parent for file in COMMITTED_REPOSITORY.glob("*/*/manifest.json"))
TRAINED = [folder for folder in BUNDLES if load_manifest(folder).network.decoder is None]
trained = pytest.mark.parametrize("folder", TRAINED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")


@pytest.fixture(scope="module")
def channel(trained_server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(trained_server.target) as channel:
        yield channel


def samples_of(channel: grpc.Channel, folder: Path) -> list[Array | str | list[str]]:
    """The recordings that ship with a bundle, words as a list, and the ends of two of them, so that lengths differ."""
    request = models_pb.ListSamplesRequest(model=folder.parent.name, version=int(folder.name))
    samples = ModelServiceStub(channel).ListSamples(request, timeout=TIMEOUT_S).samples
    assert samples
    is_words = Reference(folder).manifest["input"].get("unit") == "word"
    whole: list[Any] = [
        text_steps(sample.text, "word" if is_words else None) if sample.HasField("text") else array(sample.tensor)
        for sample in samples
    ]
    return [*whole, whole[0][-7:], whole[-1][-1:]]


def sent(values: Array | str | list[str]) -> Array | str:
    return values if isinstance(values, np.ndarray) else text_of(values)


@trained
def test_held_out_recordings_streamed_to_a_trained_network_answer_as_the_whole(
    channel: grpc.Channel, folder: Path
) -> None:
    reference = Reference(folder)
    network = reference.manifest["network"]
    if network["direction"] != "forward" or network["readout"] != "each_step":
        pytest.skip("it does not stream")
    if reference.manifest["look_ahead"]:
        pytest.skip("its answers come later: see below")
    rng = np.random.default_rng(0)
    recordings = samples_of(channel, folder)
    with ExitStack() as stack:
        streams = [
            stack.enter_context(live_stream(channel, open_(folder.parent.name, f"recording-{i}", steps=1)))
            for i in range(len(recordings))
        ]
        waiting = [cut(values, rng) for values in recordings]
        outputs: list[list[Array]] = [[] for _ in recordings]
        while any(waiting):
            number = int(rng.choice([i for i, chunks in enumerate(waiting) if chunks]))
            outputs[number].append(streams[number].step(sent(waiting[number].pop(0))))
    for values, pieces in zip(recordings, outputs, strict=True):
        assert_close(np.concatenate(pieces), reference.predict(sent(values)))


@pytest.mark.parametrize("folder", [folder for folder in TRAINED if load_manifest(folder).look_ahead])
def test_a_trained_network_that_looks_ahead_answers_about_each_step_as_the_whole(
    channel: grpc.Channel, trained_server: RunningServer, folder: Path
) -> None:
    reference = Reference(folder)
    with Client(trained_server.target) as client, client.stream(folder.parent.name) as stream:
        first_step = 0
        for values in map(sent, samples_of(channel, folder)):
            answers = [*stream.steps(values), *stream.finish()]
            assert [answer.step for answer in answers] == list(range(first_step, first_step + len(values)))
            assert_close(np.stack([answer.output for answer in answers]), reference.predict(values))
            first_step += len(values)


@trained
def test_held_out_recordings_of_different_lengths_sent_whole_answer_as_each_alone(
    channel: grpc.Channel, folder: Path
) -> None:
    reference = Reference(folder)
    each_step = reference.manifest["network"]["readout"] == "each_step"
    selection = STEP_SELECTION_ALL if each_step else STEP_SELECTION_UNSPECIFIED
    recordings = list(map(sent, samples_of(channel, folder)))
    request = predict(folder.parent.name, recordings, version=int(folder.name), steps=selection)
    predictions = SequenceServiceStub(channel).Predict(request, timeout=TIMEOUT_S).predictions
    for values, prediction in zip(recordings, predictions, strict=True):
        assert_close(array(prediction.outputs), reference.predict(values))
