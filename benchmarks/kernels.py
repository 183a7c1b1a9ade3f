"""One step of an LSTM layer by what torch offers for it: why service/engine/step_kernel.py is as it is.

- by row: `torch.lstm_cell` with the weights as they are trained;
- by column: the same with the matrices laid out column by column, as the service has them;
- oneDNN: its LSTM layer with weights in its own layout, one step;
- compiled: the cell's equations by `torch.compile`, which wants a C++ compiler (`--compiled`).

One thread; medians of many steps of each, in turn, in µs, and how many times as fast as by row.

    python -m benchmarks.kernels
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from models.recurrent import lstm_step

FEATURES = 32
LSTM_MODE = 2  # of torch's mkldnn_rnn_layer
WARM_UP = 10

Step = Callable[[], object]


def kernels(hidden: int, batch: int, *, compiled: bool) -> dict[str, Step]:
    """A step of each, by name."""
    x, h, c = torch.randn(batch, FEATURES), torch.randn(batch, hidden), torch.randn(batch, hidden)
    weights = [0.05 * torch.randn(4 * hidden, width) for width in (FEATURES, hidden)]
    biases = [0.1 * torch.randn(4 * hidden) for _ in range(2)]
    by_column = [weight.t().contiguous().t() for weight in weights]
    packed: list[Tensor] = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight(
        *weights, hidden, False, True, False, [1, batch, FEATURES]
    )
    sequence = x.unsqueeze(0)
    found: dict[str, Step] = {
        "by row": lambda: torch.lstm_cell(x, (h, c), *weights, *biases),
        "by column": lambda: torch.lstm_cell(x, (h, c), *by_column, *biases),
        "oneDNN": lambda: torch.ops.aten.mkldnn_rnn_layer(
            sequence, *packed, *biases, h, c, False, [], LSTM_MODE, hidden, 1, True, False, False, False
        ),
    }
    if compiled:
        step = torch.compile(_equations, dynamic=True)
        found["compiled"] = lambda: step(x, h, c, *weights, *biases)
    return found


def _equations(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    return lstm_step(torch.nn.functional.linear(x, weight_ih, bias_ih), (h, c), weight_hh, bias_hh)


@torch.inference_mode()
def measure(hidden: int, batch: int, turns: int, *, compiled: bool) -> dict[str, float]:
    """Microseconds of each."""
    steps = kernels(hidden, batch, compiled=compiled)
    taken_s: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + turns):
        for name, step in steps.items():
            start_s = time.perf_counter()
            step()
            if turn >= WARM_UP:
                taken_s[name].append(time.perf_counter() - start_s)
    return {name: median(of_kernel) * 1e6 for name, of_kernel in taken_s.items()}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 16, 64, 256])
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--compiled", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(hidden, batch) for hidden in given.hidden for batch in given.batch]
    rows = [
        (hidden, batch, measure(hidden, batch, given.turns, compiled=given.compiled))
        for hidden, batch in track(sizes, "kernels", console=Console(stderr=True))
    ]
    table = Table("hidden", "batch", *rows[0][2])
    for hidden, batch, us in rows:
        texts = (f"{each:,.0f} ({us['by row'] / each:.2f})" for each in us.values())
        table.add_row(f"{hidden:,}", str(batch), *texts)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
