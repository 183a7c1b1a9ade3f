"""`make bench-sequences`: whole sequences through a bidirectional network, beside what else there is, in turns.

- rnnserve: this one; and with bfloat16 weights, which bring most where the CPU has AMX;
- padded: those that wait are padded to the longest and computed together, as most servers do;
- bucketed: those of like length are packed into one call of `nn.LSTM`;
- mosec, Triton, the KServe SDK (`--peers`): the same packed call behind the batchers of the first two, and for one
  sequence after the other behind the third, which has none; installed in build/peers, and reported as missing if one
  cannot be installed, started or loaded;
- products: what the matrix products alone allow: those of the inputs for all steps at once, those of the hidden values
  step by step for as many sequences as are in flight.

All serve the same weights, and the first answers of each are compared with the network's own. Servers run on one core,
the client on another. Closed loop: so many sequences in flight. Open loop: they come as a Poisson process at a share of
the bucketed server's steps/s, whether or not those before are answered; latency counts from the moment that a sequence
was due. Medians over the turns, with the least and the most; ratios within a turn.

    python -m benchmarks.sequences --turns 2 --seconds 3
    python -m benchmarks.sequences --servers rnnserve bucketed triton --in-flight 64 --turns 1
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import grpc
import numpy as np
import torch
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.network import FEATURES, HIDDEN_SIZE, MODEL, OUTPUTS, features
from benchmarks.peers import NAMES as PEERS
from benchmarks.peers.servers import PEERS as PEER_SERVERS
from benchmarks.peers.servers import TORCH_INDEX, Peer, installed_peers, started_peers
from benchmarks.processes import CLIENT_CORE, SERVER_CORE, module_server, on_core, pinned_server
from benchmarks.sequence_load import (
    LENGTHS,
    Answered,
    Lengths,
    Predict,
    Turn,
    closed_loop,
    mean_steps,
    open_loop,
    predicting,
    random_sequence,
)
from benchmarks.sequence_report import BFLOAT16, BUCKETED, LAYERS, OURS, PADDED, PRODUCTS, TABLES, Row, write
from benchmarks.turns import MAX_EXTRA_S, Server
from models.bfloat16 import MIN_PREDICTIONS, Bfloat16Loss, write_loss
from models.recurrent import NetworkSpec
from tests.support.bundles import manifest, write_bundle
from tests.support.reference import Reference

ALL_SERVERS = (OURS, BFLOAT16, PADDED, BUCKETED, *PEERS, PRODUCTS)
CHECKED_STEPS = (50, 7, 120)
FAILURES = (RuntimeError, OSError, grpc.RpcError)
MOST_BEHIND = 10
"""Turns that an open loop may take until all are answered."""

Result = TypeVar("Result")


def products(batch: int, lengths: Lengths, seconds: float) -> Turn:
    """What the matrix products alone allow, on the servers' core."""
    torch.set_num_threads(1)
    gates = 4 * HIDDEN_SIZE
    with on_core(SERVER_CORE):
        hidden_s = _seconds_of(batch, HIDDEN_SIZE, gates, seconds) / batch
        inputs_s = [_seconds_of(256, width, gates, seconds) / 256 for width in (FEATURES, 2 * HIDDEN_SIZE)]
    steps = mean_steps(lengths)
    sequence_s = steps * 2 * sum(hidden_s + layer_s for layer_s in inputs_s)
    return Turn([Answered(round(steps), 0.0, 0.0)] * 10_000, 10_000 * sequence_s)


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
    bundle = write_bundle(repository, manifest(MODEL, spec, features()))
    of_bundle = bundle.manifest.manifest_sha256
    # Random weights have nothing to lose by rounding, but a server asks for a record.
    record = {"manifest_sha256": of_bundle, "predictions": MIN_PREDICTIONS, "float32_percent": 0, "bfloat16_percent": 0}
    write_loss(bundle.folder, Bfloat16Loss.model_validate(record))


@contextmanager
def all_servers(
    names: Sequence[str], peers: Sequence[Peer], repository: Path, folder: Path, failed: dict[str, str]
) -> Iterator[dict[str, Server]]:
    """Those of such names; peers that do not start go into `failed`."""
    with ExitStack() as stack:
        servers = {}
        for name, models in ((OURS, ""), (BFLOAT16, MODEL)):
            if name in names:
                ours = stack.enter_context(
                    pinned_server(
                        repository, session_store="memory", max_queued_sequences=10_000, bfloat16_models=models
                    )
                )
                servers[name] = Server(ours.target, ours.process.pid)
        for kind in (PADDED, BUCKETED):
            if kind in names:
                by_hand = module_server("benchmarks.by_hand_sequences", repository, kind)
                servers[kind] = Server(*stack.enter_context(by_hand))
        yield servers | stack.enter_context(started_peers(peers, "sequences", repository, folder, failed))


async def check(predict: Predict, repository: Path, tolerance: float = 1e-4) -> None:
    """Several at the same time. Raises RuntimeError if an answer is not the network's."""
    rng, reference = np.random.default_rng(0), Reference(repository / MODEL / "1")
    sequences = [random_sequence(steps, rng) for steps in CHECKED_STEPS]
    for values, answer in zip(sequences, await asyncio.gather(*map(predict, sequences)), strict=True):
        expected, outputs = reference.predict(values), np.frombuffer(answer, np.float32)
        if outputs.size != expected.size or not np.allclose(outputs.reshape(expected.shape), expected, atol=tolerance):
            raise RuntimeError(f"{len(values)} steps are answered with {outputs}, not {expected}")


async def connected(server: Server, work: Callable[[Predict], Awaitable[Result]], within_s: float) -> Result:
    """What work with a connection of its own gives. Raises RuntimeError if the server fails it, or it takes longer."""
    try:
        async with asyncio.timeout(within_s), predicting(server) as predict:
            return await work(predict)
    except (*FAILURES, ExceptionGroup) as failure:
        first: BaseException = failure
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, FAILURES):
            raise
        said = first.details() if isinstance(first, grpc.aio.AioRpcError) else str(first)
        raise RuntimeError(said or f"no end after {within_s:g} s") from None


def right(servers: dict[str, Server], repository: Path, runner: asyncio.Runner, failed: dict[str, str]) -> list[str]:
    """Names of those that answer as the network does; why peers do not goes into `failed`. Raises RuntimeError."""
    names = []
    for name, server in servers.items():
        try:
            tolerance = 0.03 if name == BFLOAT16 else 1e-4
            checked = partial(check, repository=repository, tolerance=tolerance)
            runner.run(connected(server, checked, MAX_EXTRA_S))
            names.append(name)
        except RuntimeError as reason:
            if name not in PEERS:
                raise
            failed[name] = f"does not answer as it should: {reason}"
    return names


def measure(given: argparse.Namespace, runner: asyncio.Runner, failed: dict[str, str]) -> list[Row]:
    """All rows, turn by turn; what fails goes into `failed`. Raises RuntimeError if nothing can."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder, repository = Path(temporary), Path(temporary) / "repository"
        write_network(repository)
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        peers = installed_peers(given.servers, given.torch_index, progress, failed)
        servers = stack.enter_context(all_servers(given.servers, peers, repository, folder, failed))
        names = right(servers, repository, runner, failed)
        loads = [(kind, n) for kind in given.lengths for n in given.in_flight]
        closed = [Row(name, *load) for load in loads for name in [*names, *({PRODUCTS} & {*given.servers})]]
        offers = [(kind, share) for kind in given.lengths for share in given.offered]
        opened = [Row(name, kind, share=share) for kind, share in offers for name in names]
        task = progress.add_task("sequences", total=given.turns * (len(closed) + len(opened)))
        stack.enter_context(on_core(CLIENT_CORE))

        def turn(row: Row, work: Callable[[Predict], Awaitable[Turn]]) -> None:
            load = f"{row.server} at {', '.join(row.load)}"
            if load not in failed:
                try:
                    most_s = MAX_EXTRA_S + MOST_BEHIND * given.seconds
                    row.turns.append(runner.run(connected(servers[row.server], work, most_s)))
                except RuntimeError as reason:
                    failed[load] = f"fails: {reason}"

        for seed in range(given.turns):
            for row in closed:
                lengths = LENGTHS[row.lengths]
                if row.server == PRODUCTS:
                    row.turns.append(products(row.in_flight, lengths, min(0.2, given.seconds)))
                else:
                    turn(row, partial(closed_loop, lengths, row.in_flight, given.seconds, seed))
                progress.advance(task)
        for seed in range(given.turns):
            for row in opened:
                steps_per_s = row.share * max(
                    median(r.steps_per_s()) for r in closed if (r.server, r.lengths) == (BUCKETED, row.lengths)
                )
                turn(row, partial(open_loop, LENGTHS[row.lengths], steps_per_s, given.seconds, seed))
                progress.advance(task)
    return [row for row in [*closed, *opened] if len(row.turns) == given.turns]


def chosen() -> argparse.Namespace:
    """What the command is to do."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sequences", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--servers", nargs="+", choices=ALL_SERVERS, default=[OURS, BFLOAT16, PADDED, BUCKETED, PRODUCTS]
    )
    parser.add_argument("--peers", action="store_true", help="these as well")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument(
        "--offered",
        type=float,
        nargs="*",
        default=[0.5, 0.8],
        help="of the bucketed server's steps/s; none: no open loop",
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--torch-index", default=TORCH_INDEX)
    parser.add_argument("--into", type=Path, help="write sequences.json, sequences.md and plots there")
    given = parser.parse_args()
    given.servers = [name for name in ALL_SERVERS if name in given.servers or (given.peers and name in PEERS)]
    if given.offered and BUCKETED not in given.servers:
        parser.error(
            f"what is offered is a share of what {BUCKETED} does: add it to --servers, or --offered without any"
        )
    return given


def main() -> int:
    """See above."""
    given, failed = chosen(), dict[str, str]()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = measure(given, runner, failed)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for title, table_of in TABLES.items():
        head, lines = table_of(rows)
        table = Table(*head, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for name, reason in failed.items():
        console.print(f"{name} {reason}")
    if given.into:
        asked = " ".join(
            f"--{name.replace('_', '-')} {shlex.join(map(str, getattr(given, name)))}"
            for name in ("servers", "in_flight", "lengths", "offered")
        )
        command = f"python -m benchmarks.sequences {asked} --turns {given.turns} --seconds {given.seconds:g}"
        packages = [package for peer in PEER_SERVERS if peer.name in given.servers for package in peer.packages]
        write(given.into, rows, failed, command, packages)
    return int(any(name not in PEERS and name.partition(" at ")[0] not in PEERS for name in failed))


if __name__ == "__main__":
    sys.exit(main())
