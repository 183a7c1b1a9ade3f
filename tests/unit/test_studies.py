"""The studies measure what they say."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from models.__main__ import app
from models.beam import END
from models.manifest import FeatureInput, TextInput
from models.recurrent import CELL_STEPS, RecurrentStack, Values
from models.seq2seq import EncoderDecoder
from models.studies import adding, cells, depth, directions, ensemble, gradients, look_ahead
from models.studies.gradients import SEQUENCES, STARTS, UNITS, gradient_norms, layer
from models.studies.variants import Measured, Variants, spread_of, write_page
from models.tasks.activity import ACTIVITY
from models.tasks.pronouncing_dictionary import pronunciations
from models.tasks.pronunciation import PRONUNCIATION, recording
from models.tasks.speaker import SPEAKER
from models.tasks.task import Run, Split
from models.training.card import parameters_of
from models.training.runs import Job, run_once
from models.training.sequences import Recording
from tests.support.tasks import small_task

STEPS = 7


def norms_by_restarting(stack: RecurrentStack, seed: int) -> list[float]:
    """The same, each by one pass of torch's own differentiation from that state to the end."""
    torch.manual_seed(seed)
    inputs = torch.rand(STEPS, SEQUENCES, 1)
    weights = {name: parameter.detach() for name, parameter in stack.named_parameters()}
    gates = inputs @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
    direction = torch.nn.functional.normalize(torch.randn(SEQUENCES, UNITS), dim=1)

    def to_the_end(values: Values, first: int) -> Values:
        for own in gates[first:]:
            values = CELL_STEPS[stack.spec.cell](own, values, weights["weight_hh_l0"], weights["bias_hh_l0"])
        return values

    norms = []
    for before in range(STEPS, 0, -1):
        values: Values = tuple(torch.zeros(SEQUENCES, UNITS) for _ in range(stack.spec.state_layout.values_per_layer))
        for own in gates[:before]:
            values = CELL_STEPS[stack.spec.cell](own, values, weights["weight_hh_l0"], weights["bias_hh_l0"])
        leaves = tuple(value.requires_grad_() for value in values)
        loss = (to_the_end(leaves, before)[0] * direction).sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        norms.append(float(torch.cat(found, dim=1).norm(dim=1).mean()))
    return norms


@pytest.mark.parametrize("name", STARTS)
def test_the_gradient_of_each_step_is_that_of_the_loss_with_respect_to_its_state(name: str) -> None:
    stack = layer(name, STEPS, seed=3)
    torch.manual_seed(5)
    found = gradient_norms(stack, torch.rand(STEPS, SEQUENCES, 1))
    np.testing.assert_allclose(found, norms_by_restarting(stack, 5), rtol=1e-4)


def test_gradients_vanish_but_where_the_gates_begin_open() -> None:
    steps = 300
    inputs = torch.rand(steps, SEQUENCES, 1)
    reach = {name: gradient_norms(layer(name, steps, seed=0), inputs) for name in STARTS}
    kept = {name: norms[-1] / norms[1] for name, norms in reach.items()}
    assert all(kept[name] < 1e-9 for name in ("tanh", "GRU", "LSTM"))
    assert all(kept[name] > 0.05 for name in ("ReLU, identity", "GRU, chrono", "LSTM, chrono"))
    assert all(later <= earlier for earlier, later in pairwise(reach["tanh"][1:]))


def test_the_page_shows_each_start_at_each_distance() -> None:
    relative = gradients.measure((60,), seed=0)
    page = gradients.describe(relative, 0)
    assert all(f"| {name} | " in page for name in STARTS)
    assert "d = 10 |" in page
    assert "d = 100" not in page


def test_an_unknown_study_is_named_beside_those_there_are() -> None:
    done = CliRunner().invoke(app, ["compare", "weather"])
    assert done.exit_code == 2
    assert "gradients" in done.output


def test_the_adding_problem_asks_for_the_sum_of_one_number_of_each_half() -> None:
    inputs, sums = adding.problem(9, 50)
    numbers, marks = inputs.unbind(dim=2)
    assert marks[:4].sum(dim=0).tolist() == marks[4:].sum(dim=0).tolist() == [1] * 50
    assert set(marks.flatten().tolist()) == {0, 1}
    for sequence in range(50):
        marked = [float(numbers[t, sequence]) for t in range(9) if marks[t, sequence]]
        assert float(sums[sequence]) == pytest.approx(sum(marked))


def test_a_layer_that_has_learned_to_add_is_said_to_have_solved_it() -> None:
    solved = adding.learn(adding.Job("LSTM, chrono", steps=10, seed=0, updates=1_500))
    assert solved.solved_after == len(solved.errors) * adding.CHECK_EVERY
    assert solved.errors[-1] < 0.01 <= min(solved.errors[:-1])
    short = adding.learn(adding.Job("tanh", steps=10, seed=0, updates=50))
    assert short.solved_after is None
    page = adding.describe({10: {"LSTM, chrono": [solved], "tanh": [short]}}, 50, 0)
    assert f"| LSTM, chrono | {solved.solved_after} | " in page
    assert "| tanh | not | " in page


@pytest.mark.parametrize(
    "variants",
    [cells.cells_of(SPEAKER), depth.depths_of(ACTIVITY), look_ahead.variants(), *directions.directions().values()],
)
def test_variants_have_about_as_many_parameters(variants: Variants) -> None:
    sizes = [parameters_of(task.network) for task in variants.values()]
    assert len({task.network for task in variants.values()}) > 1
    assert max(sizes) < 1.03 * min(sizes)


def test_depth_is_added_to_one_block_at_a_time() -> None:
    blocks = ("layers", "input_layers", "transition_layers", "output_layers")
    shallow, *one_block, everywhere = (task.network for task in depth.depths_of(SPEAKER).values())
    changed = [[block for block in blocks if getattr(spec, block) != getattr(shallow, block)] for spec in one_block]
    assert sorted(changed) == sorted([block] for block in blocks)
    assert all(getattr(everywhere, block) != getattr(shallow, block) for block in blocks)


def test_an_interval_of_three_seeds_is_students() -> None:
    _, mean, half = spread_of([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(2.484, abs=1e-3)  # 4.303 / √3


def test_a_page_shows_each_seed_of_each_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.studies.variants.run_all", lambda jobs, _processes: [run_once(job) for job in jobs])
    task = small_task()
    page = write_page(tmp_path / "cells.md", ["# Cells"], {"small": {"one": task, "two": task}}, seed=0)
    text = page.read_text()
    assert (tmp_path / "cells-small.png").exists()
    (one, two) = (line.split(" | ") for line in text.splitlines() if line.startswith(("| one", "| two")))
    assert one[1:] == two[1:]  # the same task with the same seeds
    assert len(set(one[2:5])) > 1


def test_the_beginning_of_a_recording_is_a_share_of_its_steps_or_words() -> None:
    numbers = Recording(np.arange(10, dtype=np.float32).reshape(5, 2), 0)
    features = FeatureInput(feature_names=("x", "y"), mean=(0, 0), std=(1, 1))
    assert directions.beginning(numbers, 0.5, features).numbers.tolist() == [[0, 1], [2, 3], [4, 5]]
    words = Recording("not a good film", 1.0)
    spec = TextInput(unit="word", symbols=("not", "a", "good", "film"))
    assert directions.beginning(words, 0.01, spec).values == "not"
    assert directions.beginning(words, 1.0, spec).values == "not a good film"


def test_a_curve_over_the_share_heard_ends_at_what_was_measured_on_the_whole(tmp_path: Path) -> None:
    task = small_task()
    runs = [Run(seed) for seed in range(2)]
    measured = Measured(task, runs, [run_once(Job(task, run)) for run in runs])
    curve = directions.by_share(measured)
    assert len(curve) == len(directions.SHARES)
    assert curve[-1] == pytest.approx(np.mean(measured.values))
    assert len(set(curve)) > 1
    _, picture = directions.anytime(tmp_path / "directions.md", "small", {"one": measured})
    assert "directions-small-anytime.png" in picture
    assert (tmp_path / "directions-small-anytime.png").exists()


def small_encoder_decoder(seed: int) -> EncoderDecoder:
    torch.manual_seed(seed)
    spec = PRONUNCIATION.network.model_copy(update={"hidden_size": 6, "embedding_size": 4})
    return EncoderDecoder(spec).eval()


@torch.no_grad()
def test_networks_that_write_together_give_each_label_the_mean_of_their_probabilities() -> None:
    networks = [small_encoder_decoder(seed) for seed in range(3)]
    inputs, labels = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[7, 2, 9]])
    taught = [network.teach(inputs, torch.tensor([5]), labels).softmax(dim=-1) for network in networks]
    together = ensemble.Ensemble(networks)
    memory = together.remember(inputs, torch.tensor([5]))
    values = together.first_values(together.ends_of(memory[0]).unsqueeze(0))
    for place, before in enumerate([END, 7, 2]):
        values = together.step(torch.tensor([before]), values)
        contexts, weights = together.attend(values[0].unsqueeze(1), memory, torch.ones(1, 5, dtype=torch.bool))
        found = together.write(values[0], contexts.squeeze(1)).exp()
        torch.testing.assert_close(found[0], torch.stack(taught)[:, 0, place].mean(dim=0))
        assert weights.sum().item() == pytest.approx(1)


def test_the_page_shows_networks_together_and_each_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [recording(word, pronunciations()[word][0]) for word in ("papa", "mama", "banana", "cocoa", "sees")]
    task = replace(
        PRONUNCIATION,
        network=small_encoder_decoder(0).spec,
        settings=replace(PRONUNCIATION.settings, epochs=1),
        split=lambda _run: Split(words, words[:2], words[2:]),
    )
    monkeypatch.setattr(ensemble, "PRONUNCIATION", task)
    monkeypatch.setattr(ensemble, "SIZES", (1, 2))
    monkeypatch.setattr(ensemble, "run_all", lambda jobs: [run_once(job) for job in jobs])
    page = ensemble.compare(tmp_path, 3)
    text = page.read_text()
    (first,) = [line.split(" | ") for line in text.splitlines() if line.startswith("| the first | ")]
    (alone,) = [line.split("; ") for line in text.splitlines() if line.startswith("Each alone: ")]
    assert alone[0] == f"Each alone: {first[1].split()[0]} and {first[2].split()[0]}"
    assert len(alone) == 2
    assert "| 2 together | " in text
    assert (tmp_path / "ensemble.png").exists()
