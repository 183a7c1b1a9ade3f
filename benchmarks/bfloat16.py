"""What bfloat16 weights bring: the step that the server runs with either, in turns, as a Markdown table.

python -m benchmarks.bfloat16 [HIDDEN_SIZE …]
"""

from __future__ import annotations

import copy
import sys
import time
from statistics import median

import numpy as np
import torch

from benchmarks.network import FEATURES, OUTPUTS, features
from models.predictor import Predictor
from models.recurrent import Cell, NetworkSpec, RecurrentNetwork
from service.engine.executor import Floats, TorchExecutor

CELLS: tuple[Cell, ...] = ("lstm", "gru", "tanh")
HIDDEN_SIZES, BATCHES = (64, 256, 1024), (1, 16, 64, 256)
TURNS, TURN_S = 15, 0.04


def executors(cell: Cell, hidden_size: int) -> tuple[TorchExecutor, TorchExecutor]:
    """The same network with float32 weights and with bfloat16 ones."""
    spec = NetworkSpec(cell=cell, features=FEATURES, hidden_size=hidden_size, outputs=OUTPUTS)
    network = RecurrentNetwork(spec).eval()
    rounded = copy.deepcopy(network)
    rounded.to_bfloat16()
    return TorchExecutor(Predictor(network, features())), TorchExecutor(Predictor(rounded, features()))


def step_us(executor: TorchExecutor, inputs: Floats) -> float:
    """The mean over a short turn."""
    rows = np.zeros((len(inputs), executor.row_size), np.float32)
    start_s, count = time.perf_counter(), 0
    while (duration_s := time.perf_counter() - start_s) < TURN_S or count < 2:
        _, rows = executor.step(inputs, rows)
        count += 1
    return duration_s / count * 1e6


def compared(both: tuple[TorchExecutor, TorchExecutor], batch: int) -> str:
    """Medians over turns, in which one comes after the other; the first warms up."""
    inputs = np.random.default_rng(0).normal(size=(batch, FEATURES)).astype(np.float32)
    turns = [[step_us(executor, inputs) for executor in both] for _ in range(TURNS + 1)][1:]
    exact_us, rounded_us = (median(times) for times in zip(*turns, strict=True))
    return f"{exact_us:,.0f} → {rounded_us:,.0f} ({exact_us / rounded_us:.2f})"


def main(hidden_sizes: tuple[int, ...]) -> None:
    """On one thread: float32 → bfloat16 in µs (how many times as fast)."""
    torch.set_num_threads(1)
    print(f"| cell, hidden size | {' | '.join(f'batch {batch}' for batch in BATCHES)} |")
    print(f"| --- |{' --- |' * len(BATCHES)}")
    for cell in CELLS:
        for hidden_size in hidden_sizes:
            both = executors(cell, hidden_size)
            columns = " | ".join(compared(both, batch) for batch in BATCHES)
            print(f"| {cell}, {hidden_size:,} | {columns} |", flush=True)


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or HIDDEN_SIZES)
