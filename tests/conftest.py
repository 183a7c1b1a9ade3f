"""Servers that the tests share: one of each kind for each worker of the test run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.bundles import write_test_repository
from tests.support.redis_server import RedisServer, start_redis
from tests.support.server import RunningServer, start_server

settings.register_profile("shared machine", deadline=None)  # where others run, too, any example may take long once
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles with random weights: vanilla (versions 1 and 2), text, words, bidirectional, stacked; two look ahead."""
    return write_test_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[RunningServer]:
    """A server of the random bundles."""
    with start_server(repository) as running:
        yield running


@pytest.fixture(scope="session")
def small_server(repository: Path) -> Iterator[RunningServer]:
    """A server of the random bundles whose limits are soon reached."""
    with start_server(
        repository,
        max_message_bytes=4_096,
        max_steps_per_message=50,
        max_streams=4,
        max_sequence_steps=100,
        max_queued_sequences=4,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def trained_server() -> Iterator[RunningServer]:
    """A server of the trained bundles."""
    with start_server() as running:
        yield running


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis that keeps what it has confirmed."""
    with start_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running
