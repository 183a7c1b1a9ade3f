from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import load_bundle
from service.engine.executor import TorchExecutor, usable_device


@pytest.mark.parametrize("model", ["stacked", "text"])
def test_a_step_is_computed_on_the_device_that_is_set(repository: Path, model: str) -> None:
    executor = TorchExecutor(load_bundle(repository / model / "1").predictor, torch.device("meta"))
    inputs = np.zeros((2, 3), np.float32) if model == "stacked" else np.zeros(2, np.int64)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # all went well but the way back
        executor.step(inputs, np.zeros((2, executor.row_size), np.float32))


@pytest.mark.parametrize("name", ["cuda:99", "hpu", "gpu"])
def test_a_device_that_this_machine_lacks_is_refused_with_torchs_reason(name: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 what torch says differs
        usable_device(name)
    assert str(refused.value)
