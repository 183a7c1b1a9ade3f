"""A recording gets the answer of the same sequence in one piece, and leaves nothing behind."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.manifest import ModelKey
from models.recurrent import NetworkSpec
from service.engine import spilled
from service.engine.sequence_engine import SequenceEngine
from service.engine.sequence_network import Floats, SequenceNetwork
from service.engine.spilled import Ask, Compute, HowFar, Piece, Progress, Read, Record, Recorder, RecordingOrder, Store
from service.errors import DiskFull, ExecutionFailed, ServingError
from tests.support.networks import look_aheads, random_bundle, rules, seeds, whole_sequence_specs
from tests.support.recordings import resident_bytes, spilled_bytes
from tests.support.reference import NumpyNetwork, Reference, assert_close
from tests.unit.test_sequence_engine import as_sent, random_sequence

MODEL = ModelKey("random", 1)
LSTM = NetworkSpec(cell="lstm", direction="bidirectional", features=3, hidden_size=4, layers=2, outputs=2)


class Asking:
    """A recorder of one network, alone."""

    def __init__(self, network: SequenceNetwork, folder: Path, most_steps: int = 4) -> None:
        self.network = network
        self.engine = SequenceEngine(8, most_steps)
        self.told: dict[int, object] = {}
        self.recorder = Recorder(self.engine, lambda _: network, self._hear, folder)

    def _hear(self, told: spilled.Told) -> None:
        self.told[told.call] = told.error or told.answer

    def ask(self, order: RecordingOrder) -> object:
        """What is told, ticks included where it takes them."""
        call = len(self.told)
        self.recorder.obey(Ask(call, order))
        while call not in self.told:
            assert self.recorder.ticked(self.engine.tick().ended) == []
        return self.told[call]

    def record(self, number: int, sequence: NDArray[np.generic], cuts: list[int]) -> None:
        assert self.ask(Record(number, Path("any"))) is None
        for part in np.split(sequence, cuts):
            assert self.ask(Store(number, part)) is None

    def answer(self, number: int, max_steps: int, *, last_only: bool = False) -> Floats:
        pieces = []
        while True:
            piece = self.ask(Read(number, max_steps, last_only))
            assert isinstance(piece, Piece)
            if piece.outputs is not None:
                pieces.append(piece.outputs)
            if not piece.more:
                return np.concatenate(pieces)


@pytest.fixture(scope="module")
def network() -> SequenceNetwork:
    with tempfile.TemporaryDirectory() as folder:
        return SequenceNetwork(random_bundle(folder, LSTM, "refuse", seed=0).predictor, MODEL)


@pytest.fixture
def asking(network: SequenceNetwork, tmp_path: Path) -> Asking:
    return Asking(network, tmp_path)


@pytest.fixture
def drop_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each sequence were long."""
    monkeypatch.setattr(spilled, "TICKS_BETWEEN_DROPS", 2)
    monkeypatch.setattr(spilled, "AT_ONCE_STEPS", 7)


def random_steps(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


@pytest.mark.usefixtures("drop_often")
def test_wherever_a_recording_is_cut_it_gets_the_answer_of_the_same_sequence_whole(tmp_path: Path) -> None:
    @settings(deadline=None)
    @given(
        spec=whole_sequence_specs, rule=rules, seed=seeds, cuts=st.lists(st.integers(1, 39), unique=True),
        steps=st.integers(1, 20), max_steps=st.integers(1, 50), last_only=st.booleans(), look_ahead=look_aheads,
    )  # fmt: skip
    def check(
        spec: NetworkSpec,
        rule: str,
        seed: int,
        cuts: list[int],
        steps: int,
        max_steps: int,
        last_only: bool,
        look_ahead: int,
    ) -> None:
        sequence = random_sequence(spec, rule, 40, np.random.default_rng(seed))
        with tempfile.TemporaryDirectory() as folder:
            bundle = random_bundle(folder, spec, rule, seed, look_ahead=look_ahead * spec.streamable)
            wanted = Reference(bundle.folder).predict(as_sent(sequence))
        asking = Asking(SequenceNetwork(bundle.predictor, MODEL), tmp_path, steps)
        asking.record(0, sequence, sorted(cuts))
        assert asking.ask(Compute(0)) is None
        assert_close(asking.answer(0, max_steps, last_only=last_only), wanted[-1:] if last_only else wanted)
        received, computed, total = asking.recorder._progress(0)
        assert (received, computed) == (40, total)
        asking.recorder.abandon(0)
        assert spilled_bytes(tmp_path) == 0

    check()


@pytest.mark.parametrize("max_steps", [16, 4_096])
def test_the_mean_over_a_long_recording_loses_nothing_in_pieces_long_or_many(tmp_path: Path, max_steps: int) -> None:
    spec = NetworkSpec(cell="tanh", features=3, hidden_size=2, outputs=2, readout="mean")
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, "refuse", seed=3, scale=2.0)
        reference = Reference(bundle.folder)
    constant = np.ones((30_000, 3), np.float32)  # so that float32 would round a sum the same way at each step
    asking = Asking(SequenceNetwork(bundle.predictor, MODEL), tmp_path, most_steps=4_096)
    asking.record(0, constant, [])
    asking.ask(Compute(0))
    wanted = NumpyNetwork(reference.manifest["network"], reference.weights).run(reference.normalised(constant))
    assert_close(asking.answer(0, max_steps), wanted)


def test_other_sequences_share_the_ticks_of_a_recording(asking: Asking, network: SequenceNetwork) -> None:
    asking.record(0, random_steps(400), [150])
    asking.recorder.obey(Ask(-1, Compute(0)))
    asking.engine.add(1, network, random_steps(10, seed=1))
    ended: list[int] = []
    ticks = 0
    while not ended:
        tick = asking.engine.tick()
        ended += [end.number for end in asking.recorder.ticked(tick.ended)]
        ticks += 1
    assert ended == [1]
    assert -1 not in asking.told
    assert ticks < 20


def test_it_is_told_at_any_time_how_far_a_recording_is(asking: Asking) -> None:
    asking.record(0, random_steps(10), [4])
    assert asking.ask(HowFar(0)) == Progress(10, 0, 0)
    asking.recorder.obey(Ask(-1, Compute(0)))
    assert asking.ask(HowFar(0)) == Progress(10, 0, 4 * 10)  # two layers in two directions
    asking.recorder.ticked(asking.engine.tick().ended)
    assert asking.ask(HowFar(0)) == Progress(10, 4, 4 * 10)
    while asking.engine:
        asking.recorder.ticked(asking.engine.tick().ended)
    assert asking.ask(HowFar(0)) == Progress(10, 4 * 10, 4 * 10)


def test_little_of_a_recording_is_in_memory_at_any_time(
    network: SequenceNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilled, "TICKS_BETWEEN_DROPS", 4)
    asking = Asking(network, tmp_path, most_steps=500)
    asking.record(0, random_steps(40_000), [15_000])
    asking.recorder.obey(Ask(-1, Compute(0)))
    seen = []
    while asking.engine:
        asking.recorder.ticked(asking.engine.tick().ended)
        seen.append(resident_bytes(tmp_path))
    more = True
    while more:
        piece = asking.ask(Read(0, 5_000, False))
        assert isinstance(piece, Piece)
        more = piece.more
        seen.append(resident_bytes(tmp_path))
    assert spilled_bytes(tmp_path) > 3_000_000
    assert 0 < max(seen) < 1_000_000


@pytest.mark.parametrize("ticks", [0, 5, 1_000])
def test_an_abandoned_recording_has_no_files_from_then_on(asking: Asking, tmp_path: Path, ticks: int) -> None:
    asking.record(0, random_steps(100), [])
    asking.recorder.obey(Ask(-1, Compute(0)))
    for _ in range(ticks):
        if asking.engine:
            asking.recorder.ticked(asking.engine.tick().ended)
    assert spilled_bytes(tmp_path) == 100 * (3 + 8 + 8) * 4  # inputs, and outputs of two stages
    asking.recorder.abandon(0)
    assert spilled_bytes(tmp_path) == 0
    while asking.engine:
        assert asking.engine.tick().ended == []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Gives how the disk gets so many bytes more, and no more."""
    left, allocate = [0], os.posix_fallocate

    def allocate_if_there_is_room(descriptor: int, offset: int, size_bytes: int) -> None:
        left[0] -= size_bytes
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", allocate_if_there_is_room)
    return lambda size_bytes: left.__setitem__(0, size_bytes)


def test_a_full_disk_refuses_that_recording_only(
    asking: Asking, tmp_path: Path, full_disk: Callable[[int], None]
) -> None:
    full_disk(12_000)
    asking.record(0, random_steps(100), [])
    asking.record(1, random_steps(10), [])
    error = asking.ask(Store(1, random_steps(100)))
    assert isinstance(error, DiskFull)
    assert error.retry_after_s
    assert spilled_bytes(tmp_path) == 100 * (3 + 8 + 8) * 4
    assert asking.ask(Compute(0)) is None
    assert len(asking.answer(0, 1_000)) == 100


def test_a_folder_that_is_not_there_is_a_fault_of_ours(network: SequenceNetwork, tmp_path: Path) -> None:
    error = Asking(network, tmp_path / "nowhere").ask(Record(0, Path("any")))
    assert isinstance(error, str)
    assert "FileNotFoundError" in error


def test_outputs_that_are_not_finite_are_refused(asking: Asking, tmp_path: Path) -> None:
    sequence = random_steps(20)
    sequence[15] = np.inf
    asking.record(0, sequence, [])
    asking.ask(Compute(0))
    error = asking.ask(Read(0, 50, False))
    assert isinstance(error, ServingError)
    assert isinstance(error, ExecutionFailed)
    assert spilled_bytes(tmp_path) == 0


def test_a_recording_that_fails_in_the_midst_is_told_and_leaves_nothing_behind(asking: Asking, tmp_path: Path) -> None:
    asking.record(0, random_steps(20), [])
    asking.recorder.obey(Ask(-1, Compute(0)))
    asking.engine._running[0].inputs = np.zeros((20, 2), np.float32)  # narrower than the network reads
    while asking.engine:
        asking.recorder.ticked(asking.engine.tick().ended)
    assert isinstance(asking.told[-1], str)
    assert spilled_bytes(tmp_path) == 0
