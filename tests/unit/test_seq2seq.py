"""Encoder-decoders: what many share the products of is what each gives alone, computed by plain torch.nn."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.beam import END, Decoding, Hypothesis
from models.bundle import Bundle
from models.manifest import ModelKey
from models.recurrent import DecoderSpec
from models.seq2seq import EncoderDecoder
from service.engine.sequence_engine import SequenceEngine
from service.engine.sequence_network import SequenceNetwork
from tests.support.bundles import write_speller
from tests.support.reference import Reference

MODEL = ModelKey("speller", 1)
WITHOUT_ATTENTION: dict[str, Any] = {"decoder": DecoderSpec(embedding_size=5, max_labels=12, attention=False)}
NETWORKS: list[dict[str, Any]] = [
    {"cell": cell, "direction": direction, **more}
    for cell, direction, more in itertools.product(
        ("tanh", "gru", "lstm"), ("forward", "bidirectional"), ({}, WITHOUT_ATTENTION, {"layers": 2})
    )
]


def engine_of(sequences: int = 64) -> SequenceEngine:
    return SequenceEngine(sequences, 16)


def hypotheses(engine: SequenceEngine) -> dict[int, list[Hypothesis]]:
    found = {}
    while engine:
        for number, outcome in engine.tick().ended:
            assert isinstance(outcome, list), outcome
            found[number] = outcome
    return found


def words(bundle: Bundle, count: int) -> list[str]:
    rng = np.random.default_rng(1)
    return ["".join(rng.choice(list("abc "), rng.integers(1, 40))) for _ in range(count)]


def symbols(word: str) -> NDArray[np.int64]:
    return np.array(["abc ".index(letter) for letter in word])


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(map(str, network.values()))[:40])
def test_paths_of_all_widths_share_products_and_each_input_gets_what_it_would_alone(
    tmp_path: Path, network: dict[str, Any]
) -> None:
    bundle = write_speller(tmp_path, network)
    served, reference, engine = SequenceNetwork(bundle.predictor, MODEL), Reference(bundle.folder), engine_of(5)
    asked = [(word, width, penalty) for word, (width, penalty) in zip(
        words(bundle, 14), itertools.cycle([(1, 0.0), (4, 0.0), (3, 1.0), (16, 0.5)])
    )]  # fmt: skip
    found = dict[int, list[Hypothesis]]()
    for number, (word, width, penalty) in enumerate(asked):
        decoding = Decoding(max_labels=12, beam_width=width, n_best=width, length_penalty=penalty)
        engine.add(number, served, symbols(word), decoding)
        found |= {number: outcome for number, outcome in engine.tick().ended if isinstance(outcome, list)}
    found |= hypotheses(engine)
    assert len(found) == len(asked)
    for number, (word, width, penalty) in enumerate(asked):
        wanted = reference.write(word, beam_width=width, length_penalty=penalty, max_labels=12)[:width]
        assert [one.labels for one in found[number]] == [one.labels for one in wanted]
        assert [one.score for one in found[number]] == pytest.approx([one.score for one in wanted], abs=1e-4)


def test_the_score_is_the_log_probability_by_which_the_network_is_taught(tmp_path: Path) -> None:
    bundle, engine = write_speller(tmp_path), engine_of()
    network = bundle.predictor.network
    assert isinstance(network, EncoderDecoder)
    asked = words(bundle, 6)
    for number, word in enumerate(asked):
        engine.add(number, SequenceNetwork(bundle.predictor, MODEL), symbols(word), Decoding(max_labels=12))
    found = hypotheses(engine)
    lengths = torch.tensor([len(word) for word in asked])
    inputs = torch.zeros(len(asked), int(lengths.max()), dtype=torch.int64)
    taught = torch.full((len(asked), 13), END)
    for number, word in enumerate(asked):
        inputs[number, : len(word)] = torch.from_numpy(symbols(word))
        taught[number, : len(found[number][0].labels)] = torch.tensor(found[number][0].labels)
    with torch.inference_mode():
        log_probabilities = network.teach(inputs, lengths, taught).log_softmax(dim=-1)
    for number, ((hypothesis,), labels) in enumerate(zip(found.values(), taught, strict=True)):
        count = min(len(hypothesis.labels) + 1, 12)
        rows = log_probabilities[number, :count]
        score = rows.gather(1, labels[:count, None]).sum().item()
        assert score == pytest.approx(found[number][0].score, abs=1e-4)


def test_attention_is_given_where_it_is_asked_for(tmp_path: Path) -> None:
    bundle, engine = write_speller(tmp_path), engine_of()
    network = SequenceNetwork(bundle.predictor, MODEL)
    for number, attention in enumerate((True, False)):
        engine.add(number, network, symbols("abcab"), Decoding(max_labels=12, beam_width=3, attention=attention))
    ((with_it,), (without,)) = (found for _, found in sorted(hypotheses(engine).items()))
    assert without.attention is None
    assert with_it.attention is not None
    assert with_it.attention.shape == (len(with_it.labels), 5)
    np.testing.assert_allclose(with_it.attention.sum(axis=1), 1.0, atol=1e-5)


def test_an_input_that_fails_or_is_abandoned_while_it_is_written_about_leaves_the_others_alone(tmp_path: Path) -> None:
    bundle, engine = write_speller(tmp_path), engine_of()
    network, decoding = SequenceNetwork(bundle.predictor, MODEL), Decoding(max_labels=12, beam_width=2, n_best=2)
    for number, word in enumerate(["abc", "cab", "bb", "a b"]):
        engine.add(number, network, symbols(word), decoding)
    while not all(running.writing for running in engine._running.values()):
        engine.tick()
    broken = engine._running[1].writing
    assert broken is not None
    broken.values = (broken.values[0][:, :3],)  # not as wide
    engine.abandon(2)
    ended = []
    while engine:
        ended += engine.tick().ended
    assert {number: isinstance(outcome, str) for number, outcome in ended} == {0: False, 1: True, 3: False}
    for number, word in ((0, "abc"), (3, "a b")):
        wanted = Reference(bundle.folder).write(word, beam_width=2, length_penalty=0.0, max_labels=12)[:2]
        (found,) = (outcome for which, outcome in ended if which == number)
        assert isinstance(found, list)
        assert [one.labels for one in found] == [one.labels for one in wanted]


def test_a_network_without_a_decoder_is_not_told_how_to_decode_and_one_with_it_is(tmp_path: Path) -> None:
    bundle = write_speller(tmp_path)
    with pytest.raises(ValueError, match="needs to know how to decode"):
        engine_of().add(0, SequenceNetwork(bundle.predictor, MODEL), symbols("abc"))
