"""A few faults of whole processes; `make chaos-fleet` has many more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.chaos.fleet import run_plan
from tests.chaos.fleets import Fleet, fleet_of
from tests.support.envoy import ENVOY

pytestmark = pytest.mark.xdist_group("fleet")

HAS_BOTH = ENVOY is not None and shutil.which("redis-server") is not None


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet_of("workers", tmp_path_factory.mktemp("workers")) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if not HAS_BOTH:
        pytest.skip("there is no redis-server, or no envoy")
    with fleet_of("services", tmp_path_factory.mktemp("services")) as fleet:
        yield fleet


@pytest.mark.parametrize("seed", range(4))
def test_every_step_counts_once_whatever_happens_to_a_worker(workers: Fleet, seed: int) -> None:
    assert run_plan(workers, seed).violations == []


@pytest.mark.parametrize("seed", range(4))
def test_every_step_counts_once_whatever_happens_to_a_service_or_redis(services: Fleet, seed: int) -> None:
    assert run_plan(services, seed).violations == []
