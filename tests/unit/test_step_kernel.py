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
