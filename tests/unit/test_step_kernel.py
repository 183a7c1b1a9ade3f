import copy
from typing import Any, get_args

import pytest
import torch

from models.predictor import Predictor
from models.recurrent import Cell, NetworkSpec, RecurrentNetwork
from service.engine.step_kernel import StepKernel
from tests.support.bundles import features

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stacked": {"layers": 2},
    "deep": {"layers": 2, "input_layers": (6, 4), "transition_layers": 3, "output_layers": (7, 3)},
}


@pytest.mark.parametrize("cell", get_args(Cell))
@pytest.mark.parametrize("shape", SHAPES)
def test_step_after_step_equals_the_whole_sequence_for_each_of_a_batch(cell: Cell, shape: str) -> None:
    torch.manual_seed(0)
    spec = NetworkSpec.model_validate({"cell": cell, "features": 3, "hidden_size": 5, "outputs": 2} | SHAPES[shape])
    predictor = Predictor(RecurrentNetwork(spec).eval(), features(3))
    sequences = torch.randn(4, 6, 3)
    kernel, rows = StepKernel(predictor), torch.zeros(4, predictor.row_size)
    whole = predictor.run(sequences, torch.full((4,), 6))
    for t in range(6):
        outputs, rows = kernel.step(sequences[:, t], rows)
        torch.testing.assert_close(outputs, whole[:, t])


@pytest.mark.parametrize("cell", get_args(Cell))
@pytest.mark.parametrize("shape", SHAPES)
def test_with_bfloat16_weights_a_step_is_the_whole_sequences_but_for_rounding_and_the_state_stays_float32(
    cell: Cell, shape: str
) -> None:
    torch.manual_seed(0)
    spec = NetworkSpec.model_validate({"cell": cell, "features": 3, "hidden_size": 5, "outputs": 2} | SHAPES[shape])
    network = RecurrentNetwork(spec).eval()
    exact_kernel = StepKernel(Predictor(copy.deepcopy(network), features(3)))
    network.to_bfloat16()
    predictor = Predictor(network, features(3))
    kernel = StepKernel(predictor)
    sequences = torch.randn(4, 6, 3)
    whole = predictor.run(sequences, torch.full((4,), 6))
    rows = exact_rows = torch.zeros(4, predictor.row_size)
    for t in range(6):
        outputs, rows = kernel.step(sequences[:, t], rows)
        _, exact_rows = exact_kernel.step(sequences[:, t], exact_rows)
        assert (outputs.dtype, rows.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(outputs, whole[:, t], atol=0.01, rtol=0.01)
        torch.testing.assert_close(rows, exact_rows, atol=0.02, rtol=0.02)
        assert not torch.equal(rows, exact_rows)


def test_a_state_keeps_what_bfloat16_cannot_hold() -> None:
    network = RecurrentNetwork(NetworkSpec(cell="lstm", features=1, hidden_size=1, outputs=1)).eval()
    network.to_bfloat16()
    for parameter in network.recurrent.parameters():
        parameter.data.zero_()
    network.recurrent.get_parameter("bias_ih_l0").data[1] = 100.0  # forget nothing
    kernel = StepKernel(Predictor(network, features(1)))
    _, rows = kernel.step(torch.zeros(1, 1), torch.tensor([[0.0, 1.0001]]))
    assert rows[0, 1] == torch.tensor(1.0001)
