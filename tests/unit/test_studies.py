"""The studies measure what they say."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from models.__main__ import app
from models.recurrent import CELL_STEPS, RecurrentStack, Values
from models.studies import adding, gradients
from models.studies.adding import Job
from models.studies.gradients import SEQUENCES, STARTS, UNITS, gradient_norms, layer

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
    solved = adding.learn(Job("LSTM, chrono", steps=10, seed=0, updates=1_500))
    assert solved.solved_after == len(solved.errors) * adding.CHECK_EVERY
    assert solved.errors[-1] < 0.01 <= min(solved.errors[:-1])
    short = adding.learn(Job("tanh", steps=10, seed=0, updates=50))
    assert short.solved_after is None
    page = adding.describe({10: {"LSTM, chrono": [solved], "tanh": [short]}}, 50, 0)
    assert f"| LSTM, chrono | {solved.solved_after} | " in page
    assert "| tanh | not | " in page
