from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from models.beam import END, Decoding
from models.manifest import FeatureInput, TextInput
from models.predictor import Predictor
from models.recurrent import Cell, DecoderSpec, Direction, NetworkSpec, RecurrentNetwork, gru_step
from models.training.answers import Answers, PredictorAnswers, last_answers
from models.training.fused import FusedStack
from models.training.loop import Epoch, Fitted, Lesson, Settings, Trainer, fit, start_orthogonal, start_shallow
from models.training.loss import sequence_loss
from models.training.measure import accuracy_by_steps, confusion_matrix, confusions, measure_live
from models.training.scores import Score, accuracy
from models.training.sequences import NO_LABEL, Batch, Recording, batches, delayed, encoded, pad

INPUT = FeatureInput(feature_names=("x", "y"), mean=(0.0, 0.0), std=(1.0, 1.0))
SPEC = NetworkSpec(cell="gru", features=2, hidden_size=8, outputs=2)
SETTINGS = Settings(epochs=20, batch_size=16, learning_rate=0.02)


def which_came_first(count: int, seed: int, steps: int = 8) -> list[Recording]:
    """The label is the feature that spiked at the first step; what follows is noise, so the network must remember."""
    rng = np.random.default_rng(seed)
    recordings = []
    for i in range(count):
        values = rng.normal(0, 0.2, (steps + int(rng.integers(4)), 2)).astype(np.float32)
        values[0, i % 2] += 2
        recordings.append(Recording(values, i % 2))
    return recordings


TRAIN, HELD_OUT = which_came_first(64, seed=1), which_came_first(32, seed=2)


def train(settings: Settings = SETTINGS, spec: NetworkSpec = SPEC, seed: int = 0) -> Fitted:
    return fit(Lesson(spec, INPUT, lambda rng: TRAIN, HELD_OUT), settings, seed)


def accuracy_percent(network: RecurrentNetwork) -> float:
    return accuracy(PredictorAnswers(Predictor(network, INPUT)), HELD_OUT)[0].value


@pytest.mark.parametrize("readout", ["each_step", "mean"])
def test_the_loop_learns_to_remember(readout: str) -> None:
    fitted = train(spec=NetworkSpec.model_validate({**SPEC.model_dump(), "readout": readout}))
    assert accuracy_percent(fitted.network) == 100


def test_the_loop_learns_across_pieces() -> None:
    fitted = train(replace(SETTINGS, truncate_steps=3))
    assert accuracy_percent(fitted.network) == 100


def test_the_same_seed_gives_the_same_weights() -> None:
    settings = replace(SETTINGS, epochs=2, dropout=0.2, input_noise=0.3, average_decay=0.9)
    first, second, other = train(settings), train(settings), train(settings, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True))
    assert not torch.equal(first.network.output.weight, other.network.output.weight)


def gradients(network: RecurrentNetwork) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def test_a_piece_has_the_gradient_of_a_sequence_that_starts_in_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    network = RecurrentNetwork(SPEC)
    trainer = Trainer(network, INPUT, replace(SETTINGS, learning_rate=0, truncate_steps=5, clip_norm=1e9))
    seen: list[list[torch.Tensor]] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(gradients(network)))
    batch = pad([recording for recording in TRAIN if len(recording.values) == 10][:4])
    trainer._run_batch(batch)

    lengths = torch.full((4,), 5)
    _, state = network(batch.values[:, :5], lengths)
    for piece, start, seen_gradients in zip(batch.values.chunk(2, dim=1), (None, state.detach()), seen, strict=True):
        network.zero_grad()
        outputs, _ = network(piece, lengths, start)
        loss, count = sequence_loss(outputs, Batch(piece, lengths, batch.targets))
        (loss / count).backward()
        for ours, wanted in zip(seen_gradients, gradients(network), strict=True):
            torch.testing.assert_close(ours, wanted)


def test_cutting_drops_the_rows_that_have_ended() -> None:
    batch = pad([Recording(np.ones((steps, 2), np.float32), label) for label, steps in enumerate((2, 5, 3))])
    first, rest, remains = batch.cut(3)
    assert first.lengths.tolist() == [2, 3, 3]
    assert remains.tolist() == [False, True, False]
    assert rest is not None
    assert (rest.lengths.tolist(), rest.targets.tolist(), rest.values.shape) == ([2], [1], (1, 2, 2))
    assert rest.cut(2)[1] is None


def test_padding_changes_nothing_in_the_loss_or_its_gradient() -> None:
    network, found = RecurrentNetwork(SPEC), []
    batch = pad(TRAIN[:6])
    for filler in (0.0, 1e3):
        values = torch.cat([batch.values, torch.full((6, 3, 2), filler)], dim=1)
        network.zero_grad()
        padded = Batch(values, batch.lengths, batch.targets)
        loss, count = sequence_loss(network(values, batch.lengths)[0], padded)
        loss.backward()
        found.append((loss, *gradients(network)))
    alone = [sequence_loss(network(b.values, b.lengths)[0], b) for b in (pad([recording]) for recording in TRAIN[:6])]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][0], torch.stack([loss for loss, _ in alone]).sum())
    assert count == sum(n for _, n in alone) == sum(len(recording.values) for recording in TRAIN[:6])


def test_early_stopping_keeps_the_weights_of_the_lowest_validation_loss() -> None:
    wrong = [replace(recording, target=1 - recording.label) for recording in HELD_OUT]  # learning makes it ever worse
    settings = replace(SETTINGS, patience=3)
    stopped = fit(Lesson(SPEC, INPUT, lambda rng: TRAIN, wrong), settings, 0)
    losses = [epoch.validation_loss for epoch in stopped.history]
    assert len(losses) == stopped.best_epoch + settings.patience < settings.epochs
    assert losses[stopped.best_epoch - 1] == min(losses)
    batch = pad(wrong)
    with torch.no_grad():
        loss, count = sequence_loss(stopped.network(batch.values, batch.lengths)[0], batch)
    assert loss.item() / count == pytest.approx(min(losses), rel=1e-5)


def test_without_validation_data_all_epochs_are_run_and_the_last_weights_kept() -> None:
    reported: list[Epoch] = []
    fitted = fit(Lesson(SPEC, INPUT, lambda rng: TRAIN), replace(SETTINGS, epochs=3, patience=1), 0, reported.append)
    assert fitted.best_epoch == len(reported) == 3
    assert not fitted.network.training


def test_the_answer_that_counts_is_the_one_after_the_last_step() -> None:
    outputs = torch.arange(6.0).reshape(2, 3, 1)
    assert last_answers(outputs, torch.tensor([1, 3])).tolist() == [[0], [5]]


def test_hidden_weights_start_orthogonal_gate_by_gate() -> None:
    network = RecurrentNetwork(SPEC)
    start_orthogonal(network)
    for gate in network.recurrent.get_parameter("weight_hh_l0").detach().chunk(3):
        torch.testing.assert_close(gate @ gate.T, torch.eye(8), atol=1e-5, rtol=0)


def test_batches_cover_every_recording_once_with_like_lengths_together() -> None:
    groups = list(batches(TRAIN, 16, np.random.default_rng(0)))
    assert sorted(id(r) for group in groups for r in group) == sorted(id(r) for r in TRAIN)
    assert max(np.ptp([len(r.values) for r in group]) for group in groups) <= 2


def test_what_is_measured_agrees_with_the_accuracy() -> None:
    network = train(replace(SETTINGS, epochs=1)).network
    percent, answers = accuracy_percent(network), PredictorAnswers(Predictor(network, INPUT))
    wrong = sum(error.times for error in confusions(confusion_matrix(answers, HELD_OUT, classes=2)))
    assert percent == pytest.approx(100 - 100 * wrong / len(HELD_OUT))
    assert measure_live(answers, HELD_OUT).last == pytest.approx(percent)
    assert accuracy_by_steps(answers, HELD_OUT, [99])[99] == pytest.approx(percent)


def test_a_deep_transition_starts_by_passing_the_state_on() -> None:
    network = RecurrentNetwork(SPEC.model_copy(update={"transition_layers": 2}))
    start_shallow(network)
    h = torch.rand(4, 8) * 2 - 1
    weights = network.recurrent.get_parameter
    (after,) = gru_step(weights("bias_ih_l0_t1"), (h,), weights("weight_hh_l0_t1"), weights("bias_hh_l0_t1"))
    assert (after - h).abs().max() < 0.1


@pytest.mark.parametrize("cell", get_args(Cell))
@pytest.mark.parametrize("direction", get_args(Direction))
def test_the_fused_layers_answer_as_those_that_are_served(cell: Cell, direction: Direction) -> None:
    spec = SPEC.model_copy(update={"cell": cell, "direction": direction, "layers": 2})
    served, fused = RecurrentNetwork(spec), RecurrentNetwork(spec, stack=FusedStack)
    fused.load_state_dict(served.state_dict())
    batch = pad(TRAIN[:6])
    torch.testing.assert_close(
        sequence_loss(fused(batch.values, batch.lengths)[0], batch),
        sequence_loss(served(batch.values, batch.lengths)[0], batch),
    )


def test_a_label_for_each_step_counts_once_and_none_where_there_is_no_label() -> None:
    rows = [np.array([0, NO_LABEL, 1]), np.array([1])]
    batch = pad([Recording(np.zeros((len(row), 2), np.float32), row) for row in rows])
    outputs = torch.zeros(2, 3, 2)
    outputs[0, 0, 0] = 100  # sure and right; the other two answers are even
    loss, count = sequence_loss(outputs, batch)
    assert loss.item() == pytest.approx(2 * np.log(2))
    assert count == 3


def test_a_real_number_is_missed_by_half_of_the_squared_distance() -> None:
    batch = pad([Recording(np.zeros((2, 2), np.float32), 1.5), Recording(np.zeros((1, 2), np.float32), -1.0)])
    loss, count = sequence_loss(torch.zeros(2, 2, 1), batch)
    assert loss.item() == pytest.approx(0.5 * (1.5**2 + 1.5**2 + 1.0))
    assert count == 3


def test_an_encoder_decoder_learns_to_spell_backwards() -> None:
    rng, letters = np.random.default_rng(0), "abc"
    texts = ["".join(rng.choice(list(letters), size=rng.integers(1, 5))) for _ in range(400)]
    words = [Recording(text, np.array([*(1 + letters.index(each) for each in text[::-1]), END])) for text in texts]
    spec = NetworkSpec(
        cell="gru", direction="bidirectional", symbols=3, embedding_size=8, hidden_size=16, outputs=4,
        decoder=DecoderSpec(embedding_size=8, max_labels=8),
    )  # fmt: skip
    lesson = Lesson(spec, TextInput(symbols=tuple(letters)), lambda rng: words)
    fitted = fit(lesson, replace(SETTINGS, epochs=40, learning_rate=0.01), 0)
    answers = PredictorAnswers(Predictor(fitted.network, lesson.input_spec))
    written = answers.written([Recording("abcb", 0), Recording("ca", 0)], Decoding(max_labels=8))
    assert written == [(2, 3, 2, 1), (1, 3)]


def test_a_look_ahead_learns_what_only_the_next_step_tells() -> None:
    rng, letters = np.random.default_rng(0), "abc"
    texts = ["".join(rng.choice(list(letters), size=rng.integers(1, 8))) for _ in range(200)]
    following = [Recording(text, np.array([letters.index(each) for each in text[1:] + "c"])) for text in texts]
    spec = NetworkSpec(cell="gru", symbols=3, embedding_size=4, hidden_size=8, outputs=3)
    input_spec = TextInput(symbols=tuple(letters), padding="c")
    right = {}
    for look_ahead in (0, 1):
        lesson = Lesson(spec, input_spec, lambda rng: following, look_ahead=look_ahead)
        network = fit(lesson, replace(SETTINGS, epochs=30, learning_rate=0.02), 0).network
        answers = PredictorAnswers(Predictor(network, input_spec, look_ahead=look_ahead))
        pairs = zip(answers.about_steps(following), following, strict=True)
        right[look_ahead] = np.mean(np.concatenate([row.argmax(dim=-1).numpy() == r.target for row, r in pairs]))
    assert right[0] < 0.7
    assert right[1] == 1.0


def test_a_delayed_recording_asks_for_each_label_so_many_steps_later() -> None:
    spec = TextInput(symbols=tuple("abc"), padding="c")
    (late,) = delayed(encoded([Recording("ab", np.array([1, 2]))], spec), spec, 2)
    assert np.array_equal(late.values, [0, 1, 2, 2])
    assert np.array_equal(late.target, [NO_LABEL, NO_LABEL, 1, 2])
    (late,) = delayed(encoded([Recording("ab", 1)], spec), spec, 1)
    assert np.array_equal(late.target, [NO_LABEL, 1, 1])
    with pytest.raises(TypeError):
        delayed(encoded([Recording("ab", 0.5)], spec), spec, 1)


def test_what_is_measured_while_a_network_trains_are_the_recordings_as_they_came() -> None:
    seen: list[object] = []

    def measure(_answers: Answers, recordings: Sequence[Recording]) -> tuple[Score, ...]:
        seen.extend(recording.values for recording in recordings)
        return (Score("nothing", 0.0, 1, 0.0, 0.0),)

    spec = NetworkSpec(cell="gru", symbols=3, embedding_size=2, hidden_size=4, outputs=2)
    texts = [Recording("ab", 0), Recording("cab", 1)]
    lesson = Lesson(spec, TextInput(symbols=("a", "b", "c")), lambda rng: texts, texts, measure)
    fit(lesson, replace(SETTINGS, epochs=1), 0)
    assert seen == ["ab", "cab"]


def test_confusions_are_named_by_frequency() -> None:
    counts = np.array([[5, 1, 0], [3, 7, 0], [0, 0, 4]])
    assert confusions(counts) == [(1, 0, 3), (0, 1, 1)]
