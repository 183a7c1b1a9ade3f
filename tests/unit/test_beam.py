"""The search for the most probable output, on tables of probabilities that can be reckoned by hand or exhausted."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.beam import END, Beam, Decoding, Hypothesis

Next = Callable[[tuple[int, ...]], list[float]]
"""From the labels so far to the probability of each next one."""


def search(following: Next, decoding: Decoding) -> list[Hypothesis]:
    beam, paths = Beam(decoding), list[tuple[int, ...]]([()])
    while not beam.is_over:
        assert beam.last_labels == [path[-1] if path else END for path in paths]
        rows = np.log(np.maximum(1e-30, np.array([following(path) for path in paths], np.float32)))
        numbers = np.tile(np.arange(rows.shape[1]), (len(paths), 1))
        attention = np.array([[len(path), 1.0] for path in paths], np.float32) if decoding.attention else None
        parents = beam.advance(rows, numbers, attention)
        labels = beam.last_labels
        paths = [(*paths[parent], label) for parent, label in zip(parents, labels, strict=True)]
    return beam.hypotheses()


def seeded(seed: int, labels: int) -> Next:
    def following(path: tuple[int, ...]) -> list[float]:
        rng = np.random.default_rng([seed, *path])
        found: list[float] = rng.dirichlet(np.ones(labels)).tolist()
        return found

    return following


def after_a_or_b(path: tuple[int, ...]) -> list[float]:
    """1 is likelier at first, but all that follows it is unlikely; behind 2 the end is sure."""
    if not path:
        return [0.0, 0.6, 0.4]
    if path[0] == 1:
        return [0.34, 0.33, 0.33]
    return [0.98, 0.01, 0.01]


def test_a_width_of_one_takes_the_likeliest_label_each_time_and_a_wider_beam_finds_the_likelier_output() -> None:
    (greedy,) = search(after_a_or_b, Decoding(max_labels=5))
    (best,) = search(after_a_or_b, Decoding(max_labels=5, beam_width=2))
    assert (greedy.labels, best.labels) == ((1,), (2,))
    assert greedy.score == pytest.approx(np.log(0.6 * 0.34), abs=1e-5)
    assert best.score == pytest.approx(np.log(0.4 * 0.98), abs=1e-5)


@given(seed=st.integers(0, 2**16), penalty=st.floats(0, 2))
def test_a_beam_that_holds_every_path_finds_the_best_of_all_outputs(seed: int, penalty: float) -> None:
    following, most = seeded(seed, 3), 3
    scores = {}
    for count in range(most + 1):
        for labels in itertools.product((1, 2), repeat=count):
            steps = [following(labels[:i])[label] for i, label in enumerate(labels)]
            length = count if count == most else count + 1
            steps += [] if count == most else [following(labels)[END]]
            scores[labels] = float(np.log(steps).sum()) / length**penalty
    found = search(following, Decoding(max_labels=most, beam_width=16, n_best=16, length_penalty=penalty))
    assert {one.labels: pytest.approx(one.score, abs=1e-4) for one in found} == scores
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_an_output_that_does_not_end_is_cut() -> None:
    found = search(lambda _: [0.01, 0.98, 0.01], Decoding(max_labels=4))
    assert [one.labels for one in found] == [(1, 1, 1, 1)]


def test_a_length_penalty_prefers_long_outputs() -> None:
    def following(path: tuple[int, ...]) -> list[float]:
        return [0.5, 0.5] if len(path) < 1 else [0.9, 0.1]

    short, long = (
        search(following, Decoding(max_labels=3, beam_width=2, length_penalty=penalty))[0] for penalty in (0.0, 1.0)
    )
    assert (short.labels, long.labels) == ((), (1,))


def test_each_hypothesis_has_the_attention_of_its_own_path() -> None:
    found = search(seeded(3, 4), Decoding(max_labels=6, beam_width=4, n_best=4, attention=True))
    for one in found:
        assert one.attention is not None
        assert one.attention.shape == (len(one.labels), 2)
        assert one.attention[:, 0].tolist() == list(range(len(one.labels)))


def test_what_has_no_end_at_the_most_labels_is_cut_and_what_has_ended_is_not() -> None:
    found = search(seeded(1, 3), Decoding(max_labels=2, beam_width=6, n_best=6))
    assert {one.is_cut for one in found} == {True, False}
    assert all(one.is_cut == (len(one.labels) == 2) for one in found)


def test_a_search_that_meets_what_is_no_number_is_over() -> None:
    beam = Beam(Decoding(max_labels=1_000))
    beam.advance(np.full((1, 2), np.nan, np.float32), np.array([[1, 2]]), None)
    assert beam.is_over
    assert np.isnan(beam.hypotheses()[0].score)


def test_a_beam_keeps_nothing_of_the_attention_of_others() -> None:
    beam, of_all = Beam(Decoding(max_labels=1, attention=True)), np.ones((100, 2), np.float32)
    beam.advance(np.log(np.array([[0.5, 0.4]], np.float32)), np.array([[1, 2]]), of_all[:1])
    (found,) = beam.hypotheses()
    assert found.attention is not None
    of_all[:] = 7
    assert found.attention.tolist() == [[1.0, 1.0]]
