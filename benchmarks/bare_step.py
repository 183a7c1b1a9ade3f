"""What the network alone can do: the step that the server runs, in a loop, with neither states to gather nor a client.

python -m benchmarks.bare_step REPOSITORY BATCH SECONDS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.network import FEATURES, MODEL
from models.bundle import load_bundle
from service.engine.executor import TorchExecutor

WARM_UP = 20


def steps_per_s(repository: Path, batch: int, seconds: float) -> float:
    """Of a batch, on one thread."""
    torch.set_num_threads(1)
    executor = TorchExecutor(load_bundle(repository / MODEL / "1").predictor)
    inputs = np.random.default_rng(0).normal(size=(batch, FEATURES)).astype(np.float32)
    rows = np.zeros((batch, executor.row_size), np.float32)
    for _ in range(WARM_UP):
        _, rows = executor.step(inputs, rows)
    start_s, count = time.perf_counter(), 0
    while (duration_s := time.perf_counter() - start_s) < seconds:
        _, rows = executor.step(inputs, rows)
        count += batch
    return count / duration_s


if __name__ == "__main__":
    print(steps_per_s(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
