from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from models.manifest import TextInput
from models.predictor import Predictor
from models.recurrent import NetworkSpec, RecurrentNetwork
from service.engine.step_kernel import StepKernel
from tests.support.bundles import features

NAN = float("nan")
Steps = Sequence[tuple[float, ...]]
MEAN = (0.0, 0.5, 1.0)
"""Of the three features that `tests.support.bundles.features` makes; the deviations are 1, 1.25, 1.5."""


def make_predictor(missing_values: str = "refuse", **rest: Any) -> Predictor:
    torch.manual_seed(0)
    network = RecurrentNetwork(NetworkSpec(cell="gru", features=3, hidden_size=4, layers=2, outputs=2, **rest))
    return Predictor(network.eval(), features(3, missing_values=missing_values))


def run(predictor: Predictor, steps: Steps) -> torch.Tensor:
    return predictor.run(torch.tensor([steps]), torch.tensor([len(steps)]))[0]


def run_in_steps(predictor: Predictor, steps: Steps) -> torch.Tensor:
    rows, outputs = torch.zeros(1, predictor.row_size), []
    for values in steps:
        output, rows = StepKernel(predictor).step(torch.tensor([values]), rows)
        outputs.append(output[0])
    return torch.stack(outputs)


def test_the_network_sees_values_less_their_mean_over_their_deviation() -> None:
    predictor = make_predictor()
    raw = torch.tensor([[[1.0, 3.0, -2.0], [0.0, 0.5, 1.0]]])
    normalised = torch.tensor([[[1.0, 2.0, -2.0], [0.0, 0.0, 0.0]]])
    wanted, _ = predictor.network(normalised, torch.tensor([2]))
    torch.testing.assert_close(predictor.run(raw, torch.tensor([2])), wanted)


HOLES = [(NAN, 1.0, NAN), (2.0, NAN, NAN), (NAN, NAN, 5.0), (3.0, 4.0, NAN)]
FILLED = {
    "hold_last": [(MEAN[0], 1.0, MEAN[2]), (2.0, 1.0, MEAN[2]), (2.0, 1.0, 5.0), (3.0, 4.0, 5.0)],
    "mean": [(MEAN[0], 1.0, MEAN[2]), (2.0, *MEAN[1:]), (*MEAN[:2], 5.0), (3.0, 4.0, MEAN[2])],
}


@pytest.mark.parametrize("rule", FILLED)
@pytest.mark.parametrize("way", [run, run_in_steps])
def test_a_missing_value_is_filled_by_the_rule(rule: str, way: Any) -> None:
    predictor = make_predictor(rule)
    torch.testing.assert_close(way(predictor, HOLES), way(predictor, FILLED[rule]))


@pytest.mark.parametrize("rule", ["refuse", "hold_last", "mean"])
def test_step_after_step_equals_the_whole_sequence(rule: str) -> None:
    predictor = make_predictor(rule)
    steps = HOLES if rule != "refuse" else FILLED["mean"]
    torch.testing.assert_close(run_in_steps(predictor, steps), run(predictor, steps))


def test_sessions_hold_their_own_last_values() -> None:
    predictor = make_predictor("hold_last")
    rows = torch.zeros(2, predictor.row_size)
    _, rows = StepKernel(predictor).step(torch.tensor([[1.0, 1.0, 1.0], [7.0, 8.0, 9.0]]), rows)
    outputs, _ = StepKernel(predictor).step(torch.full((2, 3), NAN), rows)
    torch.testing.assert_close(outputs[0], run(predictor, [(1.0, 1.0, 1.0)] * 2)[1])
    torch.testing.assert_close(outputs[1], run(predictor, [(7.0, 8.0, 9.0)] * 2)[1])


def test_only_a_held_value_widens_the_state() -> None:
    assert [make_predictor(rule).row_size for rule in ("refuse", "mean", "hold_last")] == [8, 8, 11]


def test_missing_values_of_a_padded_batch_are_held_within_their_own_row() -> None:
    predictor = make_predictor("hold_last")
    short, long = [(NAN, 1.0, 2.0)], [(5.0, 6.0, 7.0), (NAN, NAN, NAN)]
    padded = torch.tensor([[*short, (0.0, 0.0, 0.0)], long])
    outputs = predictor.run(padded, torch.tensor([1, 2]))
    torch.testing.assert_close(outputs[0, :1], run(predictor, short))
    torch.testing.assert_close(outputs[1], run(predictor, long))


def test_text_goes_in_as_the_places_of_its_symbols() -> None:
    spec = TextInput(symbols=("b", "a", " "))
    torch.manual_seed(0)
    network = RecurrentNetwork(NetworkSpec(cell="lstm", symbols=3, embedding_size=2, hidden_size=4, outputs=2))
    numbers = spec.encode("ab a")
    assert numbers.tolist() == [1, 0, 2, 1]
    outputs = Predictor(network, spec).run(torch.from_numpy(numbers[np.newaxis]), torch.tensor([4]))
    stepped, _ = StepKernel(Predictor(network, spec)).step(torch.tensor([1]), torch.zeros(1, 8))
    torch.testing.assert_close(outputs[0, 0], stepped[0])


@pytest.mark.parametrize("missing_values", ["refuse", "hold_last", "mean"])
def test_with_a_look_ahead_each_step_is_answered_about_once_so_many_more_are_read(missing_values: str) -> None:
    now = make_predictor(missing_values)
    later = Predictor(now.network, features(3, missing_values=missing_values), look_ahead=2)
    short, long = [(1.0, 3.0, -2.0)], [(5.0, 6.0, 7.0), (0.3, -1.0, 2.0), (1e6, 0.1, 0.2)]
    outputs = later.run(torch.tensor([[*short, *[(9.0, 9.0, 9.0)] * 2], long]), torch.tensor([1, 3]))
    for row, steps in zip(outputs, (short, long), strict=True):
        seen = torch.cat(
            [(torch.tensor(steps) - torch.tensor(MEAN)) / torch.tensor([1.0, 1.25, 1.5]), torch.zeros(2, 3)]
        )
        wanted = now.network(seen.unsqueeze(0), torch.tensor([len(seen)]))[0][0, 2:]
        torch.testing.assert_close(row[: len(steps)], wanted)
        read = later.read(torch.tensor(steps))
        torch.testing.assert_close(read, now.network.read(seen))


def test_a_text_is_padded_with_the_symbol_that_is_named_for_it_which_a_text_may_have_too() -> None:
    spec = TextInput(symbols=("b", "a", " "), padding="a")
    torch.manual_seed(0)
    network = RecurrentNetwork(NetworkSpec(cell="gru", symbols=3, embedding_size=2, hidden_size=4, outputs=2))
    found = Predictor(network, spec, look_ahead=2).run(torch.from_numpy(spec.encode("ab"))[None], torch.tensor([2]))
    longer = Predictor(network, spec).run(torch.from_numpy(spec.encode("abaa"))[None], torch.tensor([4]))
    torch.testing.assert_close(found, longer[:, 2:])
