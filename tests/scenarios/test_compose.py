"""A stream goes on over a restart of its container, whose sessions are in a volume."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rnnserve import Client
from rnnserve.tensors import Array
from tests.support.containers import Compose, compose_works, composed
from tests.support.server import free_port

PROJECT = "rnnserve-test"  # beside what else runs here
UP = ("up", "--detach", "--wait", "rnnserve")  # builds the image where there is none
STEPS = 200

pytestmark = [
    pytest.mark.xdist_group("compose"),
    pytest.mark.skipif(not compose_works(), reason="no Docker engine with compose runs here"),
]


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def compose(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The service alone, on a free port."""
    override = tmp_path_factory.mktemp("compose") / "ports.yml"
    override.write_text(f'services: {{rnnserve: {{ports: !override ["127.0.0.1:{port}:50051"]}}}}\n')

    with composed(PROJECT, override, *UP) as compose:
        yield compose


@pytest.mark.parametrize(
    "restart", [[("restart", "rnnserve")], [("kill", "--signal", "KILL", "rnnserve"), UP]], ids=["restart", "kill"]
)
def test_a_stream_goes_on_over(restart: list[tuple[str, ...]], compose: Compose, port: int) -> None:
    with Client(f"127.0.0.1:{port}") as client:
        recording = np.asarray(client.samples("activity")[0].input, np.float32)[:STEPS]
        with client.stream("activity") as stream:
            expected = [answer.output for answer in stream.steps(recording)]

        def inputs() -> Iterator[Array]:
            yield from recording[: STEPS // 2]
            for words in restart:
                compose(*words)
            yield from recording[STEPS // 2 :]

        with client.stream("activity") as stream:
            answers = list(stream.steps(inputs()))
    assert [answer.step for answer in answers] == list(range(STEPS))
    assert np.allclose([answer.output for answer in answers], expected, atol=1e-6)
