"""`make bench-sequences`: whole sequences through a bidirectional network, against three things, in turns.

- padded: those that wait are padded to the longest and computed together, as most servers do;
- bucketed: those of like length are packed into one call of `nn.LSTM`;
- rnnserve: this one;
- products: what the matrix products alone allow: those of the inputs for all steps at once, those of the hidden values
  step by step for as many sequences as are in flight.

Servers run on one core, the client on another. Closed loop: so many sequences in flight. Open loop: they come as a
Poisson process at a share of the bucketed server's steps/s, whether or not those before are answered; latency counts
from the moment that a sequence was due. Medians over the turns, with the least and the most; ratios within a turn.

    python -m benchmarks.sequences --turns 2 --seconds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import grpc
import numpy as np
import torch
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.network import FEATURES, HIDDEN_SIZE, MODEL, OUTPUTS, features
from benchmarks.processes import CLIENT_CORE, SERVER_CORE, module_server, on_core, pinned_server
from benchmarks.report import machine, markdown
from models.recurrent import NetworkSpec
from rnnserve.v1.sequence_service_pb2 import PredictRequest, PredictResponse, Sequence
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor
from tests.support.bundles import manifest, write_bundle
from tests.support.reference import Reference

if TYPE_CHECKING:
    from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceAsyncStub

LAYERS = 2
OURS, PADDED, BUCKETED, PRODUCTS = "rnnserve", "padded", "bucketed", "products"
SERVERS = (PADDED, BUCKETED, OURS)
WARM_UP_S = 0.5
LONGEST = 2_000
CLASSES = (20, 80, 320, LONGEST)
"""Upper bounds of the classes of lengths."""

Lengths = Callable[[np.random.Generator], int]
Ended = tuple[int, float]
"""Steps of a sequence, and its latency in seconds."""


def uniform(rng: np.random.Generator) -> int:
    """10 to 200 steps."""
    return int(rng.integers(10, 201))


def heavy_tailed(rng: np.random.Generator) -> int:
    """Log-normal: half of them have up to 40 steps, one in a hundred more than 400."""
    return min(max(1, round(float(rng.lognormal(np.log(40), 1.0)))), LONGEST)


LENGTHS: dict[str, Lengths] = {"uniform": uniform, "heavy-tailed": heavy_tailed}


@dataclass
class Row:
    """What one server did at one load: what ended in each turn, and how long that was."""

    server: str
    lengths: str
    in_flight: int = 0
    share: float = 0.0  # of the bucketed server's steps/s
    turns: list[tuple[list[Ended], float]] = field(default_factory=list)

    def steps_per_s(self) -> list[float]:
        return [sum(steps for steps, _ in ended) / seconds for ended, seconds in self.turns]

    def sequences_per_s(self) -> list[float]:
        return [len(ended) / seconds for ended, seconds in self.turns]

    def latency_ms(self, percentile: float, at_least: int = 1, at_most: int = LONGEST) -> float:
        """Of all turns, of sequences of such lengths."""
        latencies_s = [s for ended, _ in self.turns for steps, s in ended if at_least <= steps <= at_most]
        return float(np.percentile(latencies_s, percentile)) * 1e3 if latencies_s else float("nan")


def ratio(over: Row, under: Row) -> float:
    """Of steps/s, the median of the turns' ratios: the lengths differ from turn to turn."""
    return median(a / b for a, b in zip(over.steps_per_s(), under.steps_per_s(), strict=True))


def request_of(steps: int, rng: np.random.Generator) -> PredictRequest:
    """A random sequence."""
    values = rng.normal(size=(steps, FEATURES)).astype(np.float32)
    tensor = Tensor(data_type=DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
    return PredictRequest(model=MODEL, sequences=[Sequence(tensor=tensor)])


async def _timed(stub: SequenceServiceAsyncStub, steps: int, due_s: float, rng: np.random.Generator) -> Ended:
    await stub.Predict(request_of(steps, rng))
    return steps, time.perf_counter() - due_s


async def closed_loop(target: str, lengths: Lengths, in_flight: int, seconds: float, seed: int) -> list[Ended]:
    """So many callers, each with its next sequence as soon as the last is answered; what ended in time."""
    ended: list[Ended] = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub = SequenceServiceStub(channel)
        start_s = time.perf_counter() + WARM_UP_S

        async def call(rng: np.random.Generator) -> None:
            while (now_s := time.perf_counter()) < start_s + seconds:
                one = await _timed(stub, lengths(rng), now_s, rng)
                if start_s <= time.perf_counter() < start_s + seconds:
                    ended.append(one)

        await asyncio.gather(*(call(np.random.default_rng([seed, i])) for i in range(in_flight)))
    return ended


async def open_loop(target: str, lengths: Lengths, steps_per_s: float, seconds: float, seed: int) -> list[Ended]:
    """Sequences of so many steps per second, in all, at random moments."""
    rng = np.random.default_rng(seed)
    mean_steps = float(np.mean([lengths(np.random.default_rng([seed, i])) for i in range(2_000)]))
    calls = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub = SequenceServiceStub(channel)
        due_s = time.perf_counter() + WARM_UP_S
        end_s = due_s + seconds
        while due_s < end_s:
            if (early_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(early_s)
            calls.append(asyncio.create_task(_timed(stub, lengths(rng), due_s, rng)))
            due_s += float(rng.exponential(mean_steps / steps_per_s))
        return await asyncio.gather(*calls)


def products_per_s(batch: int, mean_steps: float, seconds: float) -> float:
    """Sequences per second by the matrix products alone, on the servers' core."""
    torch.set_num_threads(1)
    gates = 4 * HIDDEN_SIZE
    hidden = _seconds_of(batch, HIDDEN_SIZE, gates, seconds) / batch
    inputs = [_seconds_of(256, width, gates, seconds) / 256 for width in (FEATURES, 2 * HIDDEN_SIZE)]
    return 1 / (mean_steps * 2 * sum(hidden + of_layer for of_layer in inputs))


@torch.inference_mode()
def _seconds_of(rows: int, width: int, columns: int, seconds: float) -> float:
    left, right = torch.randn(rows, width), torch.randn(width, columns)
    start_s, count = time.perf_counter(), 0
    while (duration_s := time.perf_counter() - start_s) < seconds:
        torch.mm(left, right)
        count += 1
    return duration_s / count


def write_network(repository: Path) -> None:
    """A bidirectional LSTM of two layers."""
    spec = NetworkSpec(
        cell="lstm", direction="bidirectional", features=FEATURES, hidden_size=HIDDEN_SIZE, layers=LAYERS,
        outputs=OUTPUTS,
    )  # fmt: skip
    write_bundle(repository, manifest(MODEL, spec, features()))


@contextmanager
def all_servers(repository: Path) -> Iterator[dict[str, str]]:
    """Targets by name."""
    with ExitStack() as stack:
        targets = {
            kind: stack.enter_context(module_server("benchmarks.by_hand_sequences", repository, kind))[0]
            for kind in (PADDED, BUCKETED)
        }
        ours = stack.enter_context(pinned_server(repository, session_store="memory", max_queued_sequences=10_000))
        yield {**targets, OURS: ours.target}


def check(target: str, repository: Path) -> None:
    """Raises AssertionError if the server's answer is not the network's."""
    request = request_of(50, np.random.default_rng(0))
    with grpc.insecure_channel(target) as channel:
        response: PredictResponse = SequenceServiceStub(channel).Predict(request)
    tensor = response.predictions[0].outputs
    values = np.frombuffer(request.sequences[0].tensor.data, np.float32).reshape(50, FEATURES)
    expected = Reference(repository / MODEL / "1").predict(values)
    np.testing.assert_allclose(np.frombuffer(tensor.data, np.float32).reshape(tensor.shape), expected, atol=1e-4)


def measure(given: argparse.Namespace, runner: asyncio.Runner) -> list[Row]:
    """All rows, turn by turn."""
    closed = [Row(name, kind, n) for kind in given.lengths for n in given.in_flight for name in (*SERVERS, PRODUCTS)]
    opened = [Row(name, kind, share=share) for kind in given.lengths for share in given.offered for name in SERVERS]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_network(Path(folder))
        targets = stack.enter_context(all_servers(Path(folder)))
        for target in targets.values():
            check(target, Path(folder))
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        task = progress.add_task("sequences", total=given.turns * (len(closed) + len(opened)))
        stack.enter_context(on_core(CLIENT_CORE))
        for seed in range(given.turns):
            for row in closed:
                lengths = LENGTHS[row.lengths]
                if row.server == PRODUCTS:
                    row.turns.append(_products(row, lengths, min(0.2, given.seconds)))
                else:
                    loop = closed_loop(targets[row.server], lengths, row.in_flight, given.seconds, seed)
                    row.turns.append((runner.run(loop), given.seconds))
                progress.advance(task)
        for seed in range(given.turns):
            for row in opened:
                capacity = max(
                    median(r.steps_per_s()) for r in closed if (r.server, r.lengths) == (BUCKETED, row.lengths)
                )
                loop = open_loop(targets[row.server], LENGTHS[row.lengths], row.share * capacity, given.seconds, seed)
                row.turns.append((runner.run(loop), given.seconds))
                progress.advance(task)
    return [*closed, *opened]


def _products(row: Row, lengths: Lengths, seconds: float) -> tuple[list[Ended], float]:
    rng = np.random.default_rng(0)
    mean_steps = float(np.mean([lengths(rng) for _ in range(2_000)]))
    with on_core(SERVER_CORE):
        per_s = products_per_s(row.in_flight, mean_steps, seconds)
    return [(round(mean_steps), 0.0)] * round(per_s * 100), 100.0


def closed_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Its head and its lines."""
    head = ["lengths", "in flight", "server", "sequences/s", "÷ products", "rnnserve ÷ it", "p50 ms", "p99 ms"]
    by_name = {(row.lengths, row.in_flight, row.server): row for row in rows if row.in_flight}
    lines = []
    for (kind, n, name), row in by_name.items():
        values = row.sequences_per_s()
        timed = name != PRODUCTS
        lines.append([
            kind, str(n), name, f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})",
            f"{ratio(row, by_name[kind, n, PRODUCTS]):.2f}", f"{ratio(by_name[kind, n, OURS], row):.2f}",
            f"{row.latency_ms(50):.1f}" if timed else "", f"{row.latency_ms(99):.1f}" if timed else "",
        ])  # fmt: skip
    return head, lines


def open_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Its head and its lines."""
    bounds = list(zip((1, *(bound + 1 for bound in CLASSES)), CLASSES, strict=False))
    head = ["lengths", "offered ÷ bucketed", "server", "p50 ms", "p90 ms", "p99 ms"]
    head += [f"p90 ms, {least}–{most} steps" for least, most in bounds]
    return head, [
        [
            row.lengths, f"{row.share:.0%}", row.server, *(f"{row.latency_ms(p):.0f}" for p in (50, 90, 99)),
            *(f"{row.latency_ms(90, *bound):.0f}" for bound in bounds),
        ]
        for row in rows if row.share
    ]  # fmt: skip


def write(folder: Path, rows: list[Row], command: str) -> None:
    """sequences.json and sequences.md."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [
        {
            "server": row.server, "lengths": row.lengths, "in_flight": row.in_flight, "share": row.share,
            "sequences_per_s": row.sequences_per_s(), "steps_per_s": row.steps_per_s(),
            **({} if row.server == PRODUCTS else {f"p{p}_ms": row.latency_ms(p) for p in (50, 90, 99)}),
        }
        for row in rows
    ]  # fmt: skip
    data = {"command": command, "machine": machine(), "rows": kept}
    (folder / "sequences.json").write_text(json.dumps(data, indent=1) + "\n")
    parts = [
        "# What `make bench-sequences` has measured", f"`{command}` on {machine()}.",
        f"Bidirectional LSTM of {LAYERS} layers, {FEATURES} features, {HIDDEN_SIZE} units, random weights; servers on "
        "one core, the client on another.",
        "## Closed loop: sequences/s, medians over the turns (least–most)", markdown(*closed_table(rows)),
        "## Open loop: latency from the moment that a sequence was due", markdown(*open_table(rows)),
    ]  # fmt: skip
    (folder / "sequences.md").write_text("\n\n".join(parts) + "\n")


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sequences", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--offered", type=float, nargs="*", default=[0.5, 0.8], help="of the bucketed server's steps/s")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--into", type=Path, help="write sequences.json and sequences.md there")
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = measure(given, runner)
    for title, (head, lines) in {"closed loop": closed_table(rows), "open loop": open_table(rows)}.items():
        table = Table(*head, title=title)
        for line in lines:
            table.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 180).print(table)
    if given.into:
        write(given.into, rows, f"python -m benchmarks.sequences --turns {given.turns} --seconds {given.seconds:g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
