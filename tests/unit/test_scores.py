import numpy as np
import pytest

from models.training.scores import correlation, percent, ratio
from models.training.sequences import Target
from models.training.targets import target_of, target_text


def test_a_share_of_none_has_an_interval_of_some_width() -> None:
    score = percent("percent", 0, 100)
    assert score.value == 0
    assert score.low == pytest.approx(0, abs=1e-9)
    assert score.high == pytest.approx(3.7, abs=0.05)  # as Wilson's interval is tabulated for 0 of 100


def test_the_interval_of_a_ratio_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        wholes = rng.integers(1, 20, 100)
        score = ratio("rate", rng.binomial(wholes, 0.3), wholes)
        held += score.low <= 0.3 <= score.high
        assert score.items == wholes.sum()
    assert 180 <= held <= 199


def test_the_interval_of_a_correlation_is_narrower_where_it_is_strong() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=500).astype(np.float32)
    strong = correlation("r", x, x + 0.1 * rng.normal(size=500).astype(np.float32))
    weak = correlation("r", x, x + 3 * rng.normal(size=500).astype(np.float32))
    assert strong.value > 0.98
    assert weak.low < 1 / np.sqrt(10) < weak.high
    assert strong.high - strong.low < weak.high - weak.low


@pytest.mark.parametrize(
    ("labels", "target", "text"),
    [
        (("no", "yes"), 1, "yes"),
        ((), -1.25, "-1.25"),
        (("=", "ş"), np.array([0, 1, 0]), "=ş="),
        (("(end)", "K", "AE"), np.array([1, 2, 1, 0]), "K AE K (end)"),
    ],
)
def test_what_a_recording_is_can_be_written_down_and_read_again(
    labels: tuple[str, ...], target: Target, text: str
) -> None:
    assert target_text(target, labels) == text
    assert np.array_equal(target_of(text, labels, is_row=isinstance(target, np.ndarray)), target)
