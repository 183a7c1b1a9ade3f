"""Small bundles with random weights, for tests of everything but quality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from models.bundle import Bundle, load_bundle, save_bundle
from models.generation import Generation
from models.manifest import DataSource, FeatureInput, Manifest, Output, Pattern, Quality, TextInput
from models.recurrent import DecoderSpec, NetworkSpec, RecurrentNetwork
from models.seq2seq import network_of

LABELS = ("north", "east", "south", "west")
WORDS = ("(unknown)", "the", "film", "is", "not", "good", "bad", *(f"word{i}" for i in range(300)))
CHORDS = ("S67 A62 T59 B43", "S69 A64 T57 B45")
LOOK_AHEAD = 3
"""Of the bundles that have one."""
PHONES = ("(end)", "AA", "B", "K", "S")


def features(count: int, **rules: object) -> FeatureInput:
    """Inputs whose mean and deviation are no trivial ones."""
    return FeatureInput.model_validate(
        {
            "feature_names": [f"feature {i}" for i in range(count)],
            "mean": [0.5 * i for i in range(count)],
            "std": [1.0 + 0.25 * i for i in range(count)],
            **rules,
        }
    )


def manifest(
    name: str,
    network: NetworkSpec,
    inputs: FeatureInput | TextInput,
    *,
    labels: tuple[str, ...] = (),
    pattern: Pattern = "many-to-many aligned",
    version: int = 1,
    generation: Generation | None = None,
    look_ahead: int = 0,
) -> Manifest:
    """A manifest that passes, for a network that learned nothing."""
    return Manifest(
        name=name,
        version=version,
        summary="random weights, for tests",
        pattern=pattern,
        network=network,
        input=inputs,
        output=Output(activation="softmax" if labels else "none", labels=labels),
        generation=generation,
        look_ahead=look_ahead,
        data=DataSource(name="none", archive="none", archive_sha256="0" * 64, licence="none", credit="nobody"),
        quality=Quality(metric="none", value=0.0, split="none", items=1),
        weights_sha256="0" * 64,
    )


def write_bundle(repository: Path, described: Manifest, *, seed: int = 0, scale: float = 1.0) -> Bundle:
    """Write it with seeded random weights, multiplied by `scale`, and load it again."""
    torch.manual_seed(seed)
    network = network_of(described.network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale)
    return load_bundle(save_bundle(repository, described, network))


def write_test_repository(repository: Path) -> Path:
    """One bundle of each kind that the service treats differently."""
    vanilla = NetworkSpec(cell="tanh", features=3, hidden_size=8, outputs=4)
    for version in (1, 2):
        described = manifest("vanilla", vanilla, features(3), labels=LABELS, pattern="many-to-one", version=version)
        write_bundle(repository, described, seed=version)
    text = NetworkSpec(cell="gru", symbols=4, embedding_size=5, hidden_size=8, outputs=4)
    write_bundle(repository, manifest("text", text, TextInput(symbols=tuple("abc ")), labels=LABELS))
    words = NetworkSpec(cell="gru", symbols=len(WORDS), embedding_size=5, hidden_size=8, outputs=1)
    inputs = TextInput(unit="word", symbols=WORDS, unknown="(unknown)", fold_case=True)
    write_bundle(repository, manifest("words", words, inputs, pattern="many-to-one"))
    both_ways = NetworkSpec(
        cell="lstm", direction="bidirectional", features=3, hidden_size=6, outputs=2, readout="mean"
    )
    described = manifest("bidirectional", both_ways, features(3), labels=("yes", "no"), pattern="many-to-one")
    write_bundle(repository, described)
    stacked = NetworkSpec(cell="gru", features=3, hidden_size=8, layers=2, outputs=2)
    write_accumulator(repository)
    write_accumulator(repository, look_ahead=LOOK_AHEAD)
    ahead = TextInput(symbols=tuple("abc "), padding=" ")
    write_bundle(repository, manifest("text-ahead", text, ahead, labels=LABELS, look_ahead=LOOK_AHEAD))
    write_bundle(repository, manifest("stacked", stacked, features(3, missing_values="hold_last")))
    return repository


def write_speller(repository: Path, network: Mapping[str, Any] = MappingProxyType({}), *, seed: int = 0) -> Bundle:
    """An encoder-decoder over letters, whose outputs end by themselves, most of them."""
    spec = NetworkSpec.model_validate(
        {
            "cell": "gru", "direction": "bidirectional", "symbols": 4, "embedding_size": 5, "hidden_size": 6,
            "outputs": len(PHONES), "decoder": DecoderSpec(embedding_size=5, max_labels=12), **network,
        }
    )  # fmt: skip
    inputs = TextInput(symbols=tuple("abc "))
    described = manifest("speller", spec, inputs, labels=PHONES, pattern="many-to-many unaligned")
    return write_bundle(repository, described, seed=seed, scale=3.0)


def write_composer(
    repository: Path, name: str = "composer", *, end: str | None = ".", max_symbols: int = 500, seed: int = 0
) -> Bundle:
    """One-to-many: writes letters that it does not care much about, and a full stop where it ends."""
    symbols = tuple("abcdefg.")
    spec = NetworkSpec(cell="gru", symbols=len(symbols), embedding_size=5, hidden_size=16, outputs=len(symbols))
    described = manifest(
        name,
        spec,
        TextInput(symbols=symbols),
        labels=symbols,
        pattern="one-to-many",
        generation=Generation(start=".", end=end, max_symbols=max_symbols),
    )
    return write_bundle(repository, described, seed=seed, scale=3.0)


def write_chorale(repository: Path) -> Bundle:
    """One-to-many: writes words of four voices in turn, either note of each as readily."""
    symbols = ("END", *(word for words in zip(*map(str.split, CHORDS), strict=True) for word in words))
    spec = NetworkSpec(cell="tanh", symbols=9, embedding_size=4, hidden_size=4, outputs=9)
    described = manifest(
        "chorale",
        spec,
        TextInput(unit="word", symbols=symbols),
        labels=symbols,
        pattern="one-to-many",
        generation=Generation(start="END", end="END", max_symbols=64),
    )
    voices = [3, *(number // 2 for number in range(8))]  # of the symbols; END is as the last voice
    network = RecurrentNetwork(spec)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.zero_()
            if name.endswith("weight_ih_l0"):
                parameter.copy_(20 * torch.eye(4))  # through tanh as good as 1
        assert network.embedding is not None
        for symbol, voice in enumerate(voices):
            network.embedding.weight[symbol, voice] = 1.0
            if symbol:
                network.output.weight[symbol, (voice - 1) % 4] = 40.0
    return load_bundle(save_bundle(repository, described, network))


def write_accumulator(repository: Path, *, look_ahead: int = 0) -> Bundle:
    """A network that forgets nothing: ReLU cells with an identity recurrence, exact in whole numbers below 2**24.

    One feature x >= 0. Outputs after each step: the sum of all x, and the sum of those sums before the step, which
    tells the order of the steps too. With a look-ahead it is called "ahead".
    """
    described = manifest(
        "ahead" if look_ahead else "accumulator",
        NetworkSpec(cell="relu", features=1, hidden_size=2, outputs=2),
        FeatureInput(feature_names=("x",), mean=(0.0,), std=(1.0,)),
        look_ahead=look_ahead,
    )
    network = RecurrentNetwork(described.network)
    weights = {
        "weight_ih": [[1.0], [0.0]],  # sum += x
        "weight_hh": [[1.0, 0.0], [1.0, 1.0]],  # sums += sum
        "weight": [[1.0, 0.0], [0.0, 1.0]],  # the state as it is
    }
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            kind = next((kind for kind in ("weight_ih", "weight_hh", "bias") if kind in name), "weight")
            parameter.copy_(torch.tensor(weights.get(kind, 0.0)))
    return load_bundle(save_bundle(repository, described, network))


def accumulated(values: Iterable[float], *, look_ahead: int = 0) -> list[tuple[float, float]]:
    """What the accumulator must answer about each step of a sequence, behind which it reads zeros."""
    answers, total, totals = [], 0.0, 0.0
    for value in (*values, *[0.0] * look_ahead):
        totals += total
        total += value
        answers.append((total, totals))
    return answers[look_ahead:]
