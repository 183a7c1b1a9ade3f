"""Which symbol is drawn from what a network says."""

import numpy as np
import pytest
from numpy.typing import NDArray

from models.sampling import Doubles, Sampling, choose, log_probabilities

LOGITS = np.array([1.0, -2.0, 0.5, 3.0, 0.0, -30.0], np.float32)
SAID = log_probabilities(LOGITS)
DRAWS = 20_000
MOST_DEVIATIONS = 5.0  # so far from its mean a count is once in two million times


def softmax(logits: NDArray[np.float32], temperature: float) -> Doubles:
    powers = np.exp(logits.astype(np.float64) / temperature)
    return np.asarray(powers / powers.sum(), np.float64)


def drawn(sampling: Sampling, said: Doubles = SAID) -> set[int]:
    """All that can be, from one end of the uniform numbers to the other."""
    return {choose(said, sampling, uniform) for uniform in [*np.linspace(0, 1, 5_000, endpoint=False), 1 - 2**-53]}


def of(*probabilities: float) -> Doubles:
    return np.asarray(np.log(probabilities), np.float64)


def test_log_probabilities_are_those_of_the_softmax() -> None:
    np.testing.assert_allclose(np.exp(SAID), softmax(LOGITS, 1.0), rtol=1e-12)


def test_huge_logits_do_no_harm() -> None:
    said = log_probabilities(np.array([1e38, -1e38, 1e38], np.float32))
    assert said[0] == said[2] == pytest.approx(-np.log(2))
    assert drawn(Sampling(), said) == {0, 2}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_symbols_are_drawn_as_often_as_the_softmax_at_that_temperature_says(temperature: float) -> None:
    random = np.random.Generator(np.random.PCG64(1))
    symbols = [choose(SAID, Sampling(temperature), random.random()) for _ in range(DRAWS)]
    expected = softmax(LOGITS, temperature)
    deviations = np.sqrt(DRAWS * expected * (1 - expected))
    counts = np.bincount(symbols, minlength=len(LOGITS))
    assert (abs(counts - DRAWS * expected) <= MOST_DEVIATIONS * deviations + 1).all(), counts


def test_the_uniform_number_picks_by_the_order_of_the_symbols() -> None:
    said = of(0.25, 0.5, 0.25)
    picked = [choose(said, Sampling(), uniform) for uniform in (0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53)]
    assert picked == [0, 0, 1, 1, 2, 2]


def test_what_is_impossible_is_never_drawn() -> None:
    said = log_probabilities(np.array([-2e38, 0.0, -2e38, 0.0, -2e38], np.float32))
    assert drawn(Sampling(), said) == {1, 3}


def test_without_temperature_it_is_the_most_probable_symbol_and_of_several_the_first() -> None:
    assert drawn(Sampling(temperature=0)) == {3}
    assert drawn(Sampling(temperature=0, top_k=2, top_p=0.5), of(0.3, 0.4, 0.3)) == {1}
    assert drawn(Sampling(temperature=0), of(0.2, 0.4, 0.4)) == {1}


def test_next_to_no_temperature_is_as_good_as_none() -> None:
    assert drawn(Sampling(temperature=5e-324)) == {3}


@pytest.mark.parametrize(("top_k", "kept"), [(1, {3}), (2, {3, 0}), (4, {3, 0, 2, 4}), (0, set(range(6)))])
def test_top_k_keeps_so_many_of_the_most_probable(top_k: int, kept: set[int]) -> None:
    assert drawn(Sampling(top_k=top_k)) == kept


def test_of_equally_probable_symbols_top_k_keeps_the_first() -> None:
    assert drawn(Sampling(top_k=2), of(0.25, 0.25, 0.25, 0.25)) == {0, 1}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.001, {1}), (0.5, {1}), (0.51, {1, 2}), (0.75, {1, 2}), (0.76, {1, 2, 0}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_fewest_that_are_together_as_probable(top_p: float, kept: set[int]) -> None:
    assert drawn(Sampling(top_p=top_p), of(0.125, 0.5, 0.25, 0.125)) == kept


def test_top_p_counts_only_what_top_k_has_left() -> None:
    assert drawn(Sampling(top_k=2, top_p=0.6), of(0.3, 0.3, 0.2, 0.2)) == {0, 1}
    assert drawn(Sampling(top_k=2, top_p=0.5), of(0.3, 0.3, 0.2, 0.2)) == {0}


def test_top_p_acts_behind_the_temperature() -> None:
    assert drawn(Sampling(temperature=0.25, top_p=0.9), of(0.6, 0.3, 0.1)) == {0}
    assert drawn(Sampling(temperature=1.0, top_p=0.9), of(0.6, 0.3, 0.1)) == {0, 1}


def test_what_is_kept_is_drawn_in_the_proportions_that_it_had() -> None:
    picked = [choose(of(0.1, 0.4, 0.1, 0.2, 0.2), Sampling(top_k=3), (i + 0.5) / 1_000) for i in range(1_000)]
    assert np.bincount(picked).tolist() == [0, 500, 0, 250, 250]
