"""A tick of one LSTM layer by each kernel that service/engine/sequence_network.py has for it, as a Markdown table.

python -m benchmarks.layers
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.report import markdown
from models.recurrent import NetworkSpec, RecurrentNetwork
from service.engine.sequence_network import LayerKernel, LstmSteps, OneDnnLstm

HIDDEN_SIZE, STEPS, TURNS, TURN_S = 256, 32, 15, 0.02
INPUTS = (32, 2 * HIDDEN_SIZE)
SEQUENCES = (1, 2, 4, 8, 12, 16, 32, 64)


def kernels(inputs: int) -> dict[str, LayerKernel]:
    """Of the same layer, by name."""
    exact = RecurrentNetwork(NetworkSpec(cell="lstm", features=inputs, hidden_size=HIDDEN_SIZE, outputs=1))
    rounded = copy.deepcopy(exact)
    rounded.to_bfloat16()
    return {
        "oneDNN": OneDnnLstm(exact.recurrent, "l0"),
        "step by step": LstmSteps(exact.recurrent, "l0"),
        "oneDNN, bfloat16": OneDnnLstm(rounded.recurrent, "l0"),
    }


@torch.inference_mode()
def step_us(kernel: LayerKernel, inputs: int, sequences: int) -> float:
    """Of a tick's steps, the mean over a short turn."""
    x, zero = torch.randn(STEPS, sequences, inputs), torch.zeros(sequences, HIDDEN_SIZE)
    start_s, count = time.perf_counter(), 0
    while (duration_s := time.perf_counter() - start_s) < TURN_S:
        kernel.run(x, (zero, zero))
        count += 1
    return duration_s / count / STEPS * 1e6


def compared(of_layer: dict[str, LayerKernel], inputs: int, sequences: int) -> list[str]:
    """A line: medians over turns, in which one comes after the other; the first warms up."""
    turns = [[step_us(kernel, inputs, sequences) for kernel in of_layer.values()] for _ in range(TURNS + 1)][1:]
    return [f"{inputs:,}", str(sequences), *(f"{median(us):,.0f}" for us in zip(*turns, strict=True))]


def main() -> None:
    """On one thread, in µs a step."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    layers = {inputs: kernels(inputs) for inputs in INPUTS}
    sizes = [(inputs, sequences) for inputs in INPUTS for sequences in SEQUENCES]
    lines = [
        compared(layers[inputs], inputs, sequences)
        for inputs, sequences in track(sizes, "layers", console=Console(stderr=True))
    ]
    print(markdown(["inputs", "sequences", *layers[INPUTS[0]]], lines))


if __name__ == "__main__":
    main()
