"""A few faults of each kind in the midst of a stream; `make chaos` has many more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.harness import Harness, violations
from tests.chaos.plans import FAULTS, PAIRS, STEPS, Clients, Fault, Point, make_plan
from tests.support.bundles import write_accumulator

SEEDS = [
    *range(len(FAULTS)),  # each, and all points
    PAIRS.index(("kill", "after_checkpoint")),
    PAIRS.index(("kill", "before_answer")),
]
IDS = [f"{plan.fault}-{plan.point}" for plan in map(make_plan, SEEDS)]

pytestmark = pytest.mark.xdist_group("chaos")


@pytest.fixture(scope="module")
def accumulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("accumulator")
    write_accumulator(repository)
    return repository


@pytest.fixture(scope="module")
def harness(accumulator: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    harness = Harness(accumulator, tmp_path_factory.mktemp("chaos"))
    yield harness
    harness.close()


@pytest.mark.parametrize("clients", ["streams", "multiplexed"])
@pytest.mark.parametrize("seed", SEEDS, ids=IDS)
def test_every_step_counts_exactly_once(harness: Harness, seed: int, clients: Clients) -> None:
    outcome = harness.run(seed, clients)
    assert outcome.violations == []
    assert outcome.hit


@pytest.mark.parametrize("clients", ["streams", "multiplexed"])
@pytest.mark.parametrize(
    ("break_name", "fault"),
    [("no-held-answers", ("kill", "after_checkpoint")), ("no-index-check", ("kill", "before_send"))],
)
def test_broken_code_is_found_out(
    accumulator: Path, tmp_path: Path, break_name: str, fault: tuple[Fault, Point], clients: Clients
) -> None:
    harness = Harness(accumulator, tmp_path, break_name)
    try:
        assert harness.run(PAIRS.index(fault), clients).violations
    finally:
        harness.close()


def test_holes_repetitions_and_wrong_answers_are_found_out() -> None:
    script = make_plan(0).script
    right = list(enumerate(script.expected()))
    assert violations(right, script) == []
    for wrong in (right[:-1], right[:3] + right[4:], [*right[:3], *right[2:]], [*right[:STEPS], (STEPS, (0.5, 0.5))]):
        assert violations(wrong, script)
