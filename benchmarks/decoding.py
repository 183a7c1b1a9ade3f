"""Outputs/s of an encoder-decoder in the engine, by how many inputs are under way and how wide the beams are.

A bidirectional GRU of 128 units reads 4 to 11 symbols, a GRU of 256 with attention writes 8 of 40 labels: as from
spelling to phonemes. Random weights, one core.

    python -m benchmarks.decoding
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.network import MODEL
from benchmarks.processes import SERVER_CORE, on_core
from benchmarks.report import markdown
from models.beam import Decoding
from models.manifest import TextInput
from models.recurrent import DecoderSpec, NetworkSpec
from service.engine.sequence_engine import SequenceEngine
from service.engine.sequence_network import SequenceNetwork
from service.engine.sequence_worker import MAX_TICK_STEPS
from tests.support.bundles import manifest, write_bundle

SYMBOLS, LABELS, WRITTEN = 27, 40, 8
UNDER_WAY, BEAM_WIDTHS, TURNS, TURN_S = (1, 16, 64), (1, 4), 5, 0.5


def network(repository: Path) -> SequenceNetwork:
    """With random weights, so that an output seldom ends before WRITTEN labels."""
    spec = NetworkSpec(
        cell="gru", direction="bidirectional", symbols=SYMBOLS, embedding_size=64, hidden_size=128, outputs=LABELS,
        decoder=DecoderSpec(embedding_size=64, max_labels=WRITTEN),
    )  # fmt: skip
    symbols, labels = (tuple(map(chr, range(ord("a"), ord("a") + count))) for count in (SYMBOLS, LABELS))
    described = manifest(MODEL, spec, TextInput(symbols=symbols), labels=labels, pattern="many-to-many unaligned")
    bundle = write_bundle(repository, described)
    return SequenceNetwork(bundle.predictor, bundle.manifest.key)


def outputs_per_s(network: SequenceNetwork, under_way: int, beam_width: int) -> float:
    """With so many inputs under way at any time."""
    rng, decoding = np.random.default_rng(0), Decoding(max_labels=WRITTEN, beam_width=beam_width)
    engine = SequenceEngine(max(UNDER_WAY), MAX_TICK_STEPS)
    for number in range(under_way):
        engine.add(number, network, rng.integers(0, SYMBOLS, rng.integers(4, 12)), decoding)
    start_s, ended = time.perf_counter(), 0
    while (duration_s := time.perf_counter() - start_s) < TURN_S:
        for end in engine.tick().ended:
            engine.add(end.number, network, rng.integers(0, SYMBOLS, rng.integers(4, 12)), decoding)
            ended += 1
    return ended / duration_s


def main() -> None:
    """Medians over turns, in which one load comes after the other; the first warms up."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    loads = [(under_way, width) for under_way in UNDER_WAY for width in BEAM_WIDTHS]
    with tempfile.TemporaryDirectory() as folder, on_core(SERVER_CORE):
        random = network(Path(folder))
        turns = [
            [outputs_per_s(random, *load) for load in loads]
            for _ in track(range(TURNS + 1), "decoding", console=Console(stderr=True))
        ][1:]
    by_load = dict(zip(loads, map(median, zip(*turns, strict=True)), strict=True))
    head = ["inputs under way", *(f"outputs/s, beam {width}" for width in BEAM_WIDTHS)]
    print(markdown(head, [[str(n), *(f"{by_load[n, width]:,.0f}" for width in BEAM_WIDTHS)] for n in UNDER_WAY]))


if __name__ == "__main__":
    main()
