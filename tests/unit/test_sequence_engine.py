"""Whatever sequences share their ticks, each gets the answer that the equations give for it alone."""

import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from models.manifest import ModelKey
from models.recurrent import NetworkSpec
from service.engine import sequence_network
from service.engine.sequence_engine import Ended, SequenceEngine
from service.engine.sequence_network import (
    CellLayer,
    Floats,
    LaneKernel,
    LayerKernel,
    LstmSteps,
    OneDnnLstm,
    SequenceNetwork,
)
from tests.support.networks import SYMBOLS, look_aheads, random_bundle, rules, seeds, whole_sequence_specs
from tests.support.reference import Reference, assert_close

MODEL = ModelKey("random", 1)

comings = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12)
"""How many steps each sequence has, and whether there is a tick before the next one comes."""


def random_sequence(spec: NetworkSpec, rule: str, steps: int, rng: np.random.Generator) -> NDArray[np.generic]:
    if not spec.features:
        return rng.integers(0, len(SYMBOLS), steps)
    values = rng.normal(size=(steps, spec.features)).astype(np.float32)
    if rule != "refuse":
        values[rng.random(values.shape) < 0.2] = np.nan
    return values


def as_sent(sequence: NDArray[np.generic]) -> NDArray[np.generic] | str:
    return "".join(SYMBOLS[number] for number in sequence.tolist()) if sequence.ndim == 1 else sequence


def to_the_end(engine: SequenceEngine) -> list[Ended]:
    ended = []
    while engine:
        ended += engine.tick().ended
    return ended


def answers(ended: list[Ended]) -> dict[int, Floats]:
    assert all(isinstance(end.outcome, np.ndarray) for end in ended)
    return {end.number: end.outcome for end in ended if isinstance(end.outcome, np.ndarray)}


@settings(deadline=None)
@given(
    spec=whole_sequence_specs, rule=rules, seed=seeds, comings=comings, most=st.integers(1, 6),
    steps=st.integers(1, 20), abandoned=st.sets(st.integers(0, 11)), look_ahead=look_aheads,
)  # fmt: skip
def test_every_sequence_gets_its_answer_whoever_comes_shares_its_ticks_or_goes(
    spec: NetworkSpec,
    rule: str,
    seed: int,
    comings: list[tuple[int, bool]],
    most: int,
    steps: int,
    abandoned: set[int],
    look_ahead: int,
) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, rule, seed, look_ahead=look_ahead * spec.streamable)
        reference, network = Reference(bundle.folder), SequenceNetwork(bundle.predictor, MODEL)
        engine = SequenceEngine(most, steps)
        sequences = [random_sequence(spec, rule, count, rng) for count, _ in comings]
        found: dict[int, Floats] = {}
        for number, (sequence, (_, ticks)) in enumerate(zip(sequences, comings, strict=True)):
            engine.add(number, network, sequence)
            if ticks and engine:
                found |= answers(engine.tick().ended)
        for number in abandoned - found.keys():
            engine.abandon(number)
        kept = set(range(len(sequences))) - (abandoned - found.keys())
        found |= answers(to_the_end(engine))
        assert found.keys() == kept
        for number in kept:
            assert_close(found[number], reference.predict(as_sent(sequences[number])))


def test_steps_that_are_computed_behind_an_end_are_counted_as_padding() -> None:
    engine, network = SequenceEngine(8, 128), lstm(layers=1)
    for number, steps in enumerate((8, 6)):
        engine.add(number, network, np.zeros((steps, 3), np.float32))
    tick = engine.tick()
    assert (tick.steps, tick.padding) == (16, 2)


def test_a_sequence_that_fails_in_the_midst_leaves_its_neighbours_alone() -> None:
    engine, network = SequenceEngine(8, 4), lstm(layers=1)
    rng = np.random.default_rng(0)
    good = [rng.normal(size=(steps, 3)).astype(np.float32) for steps in (9, 5)]
    engine.add(0, network, good[0])
    engine.add(1, network, rng.normal(size=(6, 3)).astype(np.float32))
    engine.add(2, network, good[1])
    wrong = engine._running[1]
    wrong.in_order = [(np.zeros((6, 2), np.float32), outputs) for _, outputs in wrong.in_order]  # not as wide
    ended = to_the_end(engine)
    assert [end.number for end in ended if isinstance(end.outcome, str)] == [1]
    found = answers([end for end in ended if end.number != 1])
    for number, sequence in ((0, good[0]), (2, good[1])):
        alone = SequenceEngine(1, 100)
        alone.add(number, network, sequence)
        assert_close(found[number], answers(to_the_end(alone))[number])


@pytest.mark.parametrize("fails", ["answer", "begin_stage"])
def test_a_sequence_for_whose_answer_or_next_layer_there_is_no_memory_leaves_its_neighbours_alone(
    monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    engine, network = SequenceEngine(8, 4), lstm(layers=2)
    for number, steps in enumerate((9, 6, 5)):
        engine.add(number, network, np.ones((steps, 3), np.float32))
    kind: Any = SequenceNetwork if fails == "answer" else type(engine._running[1])
    right = getattr(kind, fails)

    def without_memory(self: Any, *hidden: Floats) -> Any:
        if (len(hidden[0]) if hidden else self.steps) == 6:
            raise MemoryError
        return right(self, *hidden)

    monkeypatch.setattr(kind, fails, without_memory)
    ended = to_the_end(engine)
    assert {end.number: isinstance(end.outcome, str) for end in ended} == {0: False, 1: True, 2: False}
    assert not engine._running


def test_little_is_computed_behind_the_ends_of_sequences_and_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = list[int](), LaneKernel.run

    def counted(kernel: LaneKernel, inputs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(inputs.shape[0] * inputs.shape[1])
        return run(kernel, inputs, rows)

    monkeypatch.setattr(LaneKernel, "run", counted)
    engine, network, lengths = SequenceEngine(64, 128), lstm(layers=1), range(128, 0, -3)
    for number, steps in enumerate(lengths):
        engine.add(number, network, np.zeros((steps, 3), np.float32))
    to_the_end(engine)
    needed = 2 * sum(lengths)  # of two directions
    assert needed <= sum(calls) < 1.1 * needed
    assert len(calls) < len(lengths)


def lstm(layers: int) -> SequenceNetwork:
    spec = NetworkSpec(cell="lstm", direction="bidirectional", features=3, hidden_size=4, layers=layers, outputs=2)
    with tempfile.TemporaryDirectory() as folder:
        return SequenceNetwork(random_bundle(folder, spec, "refuse", seed=0).predictor, MODEL)


@pytest.mark.parametrize("kernel", [LstmSteps, OneDnnLstm])
@pytest.mark.parametrize(("is_bfloat16", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_all_kernels_of_an_lstm_layer_give_the_same(
    kernel: type[LstmSteps | OneDnnLstm], is_bfloat16: bool, tolerance: float
) -> None:
    spec = NetworkSpec(cell="lstm", features=3, hidden_size=16, outputs=2)
    with tempfile.TemporaryDirectory() as folder:
        network = random_bundle(folder, spec, "refuse", seed=1).predictor.network
    if is_bfloat16:
        network.to_bfloat16()
    inputs, values = torch.randn(7, 5, 3), (torch.randn(5, 16), torch.randn(5, 16))
    with torch.inference_mode():
        try:
            fast = kernel(network.recurrent, "l0").run(inputs, values)
        except RuntimeError:
            pytest.skip("this processor has no such kernel")
        plain = CellLayer(network.recurrent, "l0").run(inputs, values)
    torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance)


def test_a_large_lstm_gives_the_same_to_few_sequences_as_to_many() -> None:
    spec = NetworkSpec(cell="lstm", direction="bidirectional", features=3, hidden_size=256, layers=2, outputs=2)
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, "refuse", seed=0)
        reference, network = Reference(bundle.folder), SequenceNetwork(bundle.predictor, MODEL)
        sequences = [np.random.default_rng(i).normal(size=(20 + i, 3)).astype(np.float32) for i in range(12)]
        for together in (1, 3, 12):
            engine = SequenceEngine(together, 16)
            for number, sequence in enumerate(sequences):
                engine.add(number, network, sequence)
            for number, found in answers(to_the_end(engine)).items():
                assert_close(found, reference.predict(sequences[number]))


@pytest.mark.parametrize(("faster", "slower"), [(LstmSteps, OneDnnLstm), (OneDnnLstm, LstmSteps)])
def test_few_sequences_get_the_kernel_of_a_large_lstm_that_is_measured_as_the_faster_one(
    monkeypatch: pytest.MonkeyPatch, faster: type[LayerKernel], slower: type[LayerKernel]
) -> None:
    spec = NetworkSpec(cell="lstm", features=3, hidden_size=512, outputs=2)
    with tempfile.TemporaryDirectory() as folder:
        predictor = random_bundle(folder, spec, "refuse", seed=0).predictor
    try:
        OneDnnLstm(predictor.network.recurrent, "l0")
    except RuntimeError:
        pytest.skip("this processor has no such kernel")
    monkeypatch.setattr(sequence_network, "_few_s", lambda kernel, *_: 1.0 if isinstance(kernel, faster) else 2.0)
    lane = SequenceNetwork(predictor, MODEL).stages[0][0]
    monkeypatch.delattr(slower, "run")  # nobody may call it
    with torch.inference_mode():
        lane.run(torch.zeros(2, 4, 3), torch.zeros(4, lane.row_size))
