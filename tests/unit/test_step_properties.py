"""Every path of a step gives what the equations give, whatever happens to the stream, its neighbours and its batch."""

import asyncio
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.bundle import Bundle
from models.recurrent import NetworkSpec
from service.engine.executor import Floats, StepExecutor, TorchExecutor
from service.engine.step_engine import StepEngine
from tests.support.bundles import features, manifest
from tests.support.fakes import CountingMetrics
from tests.support.faults import FAULTS, Fault, FaultyExecutor, Steps
from tests.support.interrupted import Act, Bench, Interruption, Move, Network, Reset, Send
from tests.support.networks import SYMBOLS, random_bundle, rules, seeds, specs
from tests.support.reference import StepReference, assert_close

Array = NDArray[Any]
FIRST_FAULTY_SYMBOL = len(SYMBOLS) - len(FAULTS)
FIRST_FAULTY_NUMBER = 1_000_000

whatever_the_clock_says = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# What happens to a stream

faults = st.sampled_from(FAULTS)
pauses = st.integers(0, 4)
interruptions = st.builds(
    Interruption,
    ending=st.sampled_from(["cancel", "take over", "take over from one that goes on"]),
    forwards=st.integers(0, 5),
    turns=st.integers(0, 3),
)
sends = st.builds(
    Send,
    steps=st.integers(1, 6),
    fault=st.none() | st.tuples(st.integers(0, 5), faults),
    repeated=st.just(0) | st.integers(0, 4),
    last_only=st.booleans(),
    interruption=st.none() | interruptions,
    pause=pauses,
)
acts = (
    sends | sends | st.builds(Reset, st.booleans(), pauses) | st.builds(Move, st.booleans(), st.integers(0, 4), pauses)
)
scripts = st.lists(st.lists(acts, min_size=1, max_size=5), min_size=1, max_size=6)
max_tick_sessions = st.integers(1, 8)
max_loop_tick_s = st.sampled_from([0.0, math.inf])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Failures on purpose fill no log."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


class Sums:
    """Two exact sums, of the steps and of the sums before them, so that no two orders of steps end alike."""

    row_size = 2

    def step(self, inputs: Array, rows: Floats) -> tuple[Floats, Floats]:
        new_rows = np.column_stack([rows[:, 0] + inputs[:, 0], rows[:, 0] + rows[:, 1]])
        return new_rows[:, :1], new_rows


def summed(x: Array, row: Array) -> tuple[Array, Array]:
    """What `Sums` must give."""
    total = row[0] + x[0]
    return np.array([total]), np.array([total, row[0] + row[1]])


whole_numbers = Steps(lambda count, rng: rng.integers(1, 100, (count, 1)).astype(np.float32), FIRST_FAULTY_NUMBER)


def steps_of(spec: NetworkSpec, rule: str) -> Steps:
    """With a hole here and there, where the rule has an answer to it."""

    def random(count: int, rng: np.random.Generator) -> Array:
        if spec.symbols:
            return rng.integers(FIRST_FAULTY_SYMBOL, size=count)
        values = rng.normal(size=(count, spec.features or 0)).astype(np.float32)
        values[rng.random(values.shape) < 0.3 * (rule != "refuse")] = np.nan
        return values

    return Steps(random, FIRST_FAULTY_SYMBOL if spec.symbols else FIRST_FAULTY_NUMBER)


async def play_sums(
    scripts: Sequence[Sequence[Act]], seed: int, max_tick_sessions: int, max_loop_tick_s: float
) -> FaultyExecutor:
    spec = NetworkSpec(cell="relu", features=1, hidden_size=2, outputs=1)
    executor = FaultyExecutor(Sums(), whole_numbers)
    network = Network(
        manifest("sums", spec, features(1)), executor, whole_numbers, summed, np.testing.assert_array_equal
    )
    await play(network, scripts, seed, max_tick_sessions, max_loop_tick_s)
    return executor


async def play_bundle(
    bundle: Bundle,
    steps: Steps,
    scripts: Sequence[Sequence[Act]],
    seed: int,
    max_tick_sessions: int,
    max_loop_tick_s: float,
) -> FaultyExecutor:
    executor = FaultyExecutor(TorchExecutor(bundle.predictor), steps)
    network = Network(bundle.manifest, executor, steps, StepReference(bundle.folder).step, assert_close)
    await play(network, scripts, seed, max_tick_sessions, max_loop_tick_s)
    return executor


async def play(
    network: Network, scripts: Sequence[Sequence[Act]], seed: int, max_tick_sessions: int, max_loop_tick_s: float
) -> None:
    engine = StepEngine(
        {network.manifest.key: network.executor},
        max_tick_sessions=max_tick_sessions,
        metrics=CountingMetrics(),
        max_loop_tick_s=max_loop_tick_s,
    )
    try:
        await Bench(network, engine).play(scripts, seed)
    finally:
        engine.close()
    assert max(network.executor.batches) <= max_tick_sessions


@settings(whatever_the_clock_says, max_examples=100)
@given(scripts, seeds, max_tick_sessions, max_loop_tick_s)
def test_whatever_happens_to_its_streams_a_session_holds_exactly_the_steps_that_were_applied(
    scripts: list[list[Act]], seed: int, max_tick_sessions: int, max_loop_tick_s: float
) -> None:
    asyncio.run(play_sums(scripts, seed, max_tick_sessions, max_loop_tick_s))


def test_hundreds_of_sessions_that_begin_one_after_another_keep_their_states_apart() -> None:
    scripts = [[Send(2, pause=i), Send(1)] for i in range(300)]
    asyncio.run(play_sums(scripts, 0, 8, math.inf))


@settings(whatever_the_clock_says, max_examples=60)
@given(specs, rules, scripts, seeds, max_tick_sessions, max_loop_tick_s)
def test_whatever_happens_to_its_streams_every_network_answers_as_the_equations(
    spec: NetworkSpec,
    rule: str,
    scripts: list[list[Act]],
    seed: int,
    max_tick_sessions: int,
    max_loop_tick_s: float,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, rule, seed)
        steps = steps_of(spec, rule)
        asyncio.run(play_bundle(bundle, steps, scripts, seed, max_tick_sessions, max_loop_tick_s))


@settings(whatever_the_clock_says, max_examples=40)
@given(specs, rules, st.lists(st.none() | faults, min_size=2, max_size=8), seeds, max_loop_tick_s)
def test_whichever_steps_of_a_batch_fail_the_others_answer_as_the_equations(
    spec: NetworkSpec, rule: str, faults: list[Fault | None], seed: int, max_loop_tick_s: float
) -> None:
    scripts = [[Send(1, fault and (0, fault)), Send(2), Send(1, (0, "raises"))] for fault in faults]
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, rule, seed)
        executor = asyncio.run(play_bundle(bundle, steps_of(spec, rule), scripts, seed, 8, max_loop_tick_s))
    assert executor.batches[0] == len(faults) or max_loop_tick_s == 0


@settings(whatever_the_clock_says, max_examples=80)
@given(specs, rules, st.sampled_from([1.0, 2.0, 4.0]), st.integers(1, 8), seeds)
def test_every_row_of_a_batch_answers_as_the_equations_from_its_own_state(
    spec: NetworkSpec, rule: str, gain: float, batch: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    in_a_row = spec.layers * spec.transition_layers + len(spec.input_layers) + len(spec.output_layers)
    scale = gain ** (1 / in_a_row)  # each layer amplifies what the one before has rounded
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, rule, seed, scale)
        executor: StepExecutor = TorchExecutor(bundle.predictor)
        reference = StepReference(bundle.folder)
    inputs = steps_of(spec, rule).random(batch, rng)
    rows = rng.uniform(-1, 1, (batch, executor.row_size)).astype(np.float32)
    before = rows.copy()
    found = zip(*executor.step(inputs, rows), strict=True)
    np.testing.assert_array_equal(rows, before)
    for x, row, (output, new_row) in zip(inputs, before, found, strict=True):
        wanted, wanted_row = reference.step(x, row)
        largest = max(1.0, np.abs(wanted).max(), np.abs(wanted_row).max())  # large weights leave large differences
        assert_close(output / largest, wanted / largest)
        assert_close(new_row / largest, wanted_row / largest)
