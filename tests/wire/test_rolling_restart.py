"""A rolling restart takes new settings and models, or changes nothing where it cannot."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rnnserve import Client
from tests.support.bundles import write_accumulator
from tests.support.server import RunningServer, start_server
from tests.support.wire import eventually
from tests.wire.test_workers import counted, lanes, workers

pytestmark = pytest.mark.xdist_group("rolling")

WORKER_TIMEOUT_S = 1
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Of two workers, with a settings file beside its repository."""
    folder = tmp_path_factory.mktemp("rolling")
    write_accumulator(folder / "repository")
    (folder / "state").mkdir()
    (folder / "settings.toml").write_text("")
    settings = {
        "workers": 2, "settings_file": folder / "settings.toml", "worker_timeout_s": WORKER_TIMEOUT_S,
        "drain_timeout_s": 1,
    }  # fmt: skip
    with start_server(folder / "repository", folder / "state", **settings) as server:
        yield server


@pytest.fixture
def settings_file(server: RunningServer) -> Iterator[Path]:
    """Empty, as at the start, before and after."""
    file = server.log_file.parents[1] / "settings.toml"
    yield file
    file.write_text("")


def everyone(server: RunningServer) -> list[int]:
    return [*lanes(server), *workers(server)]


def roll(server: RunningServer, until: str) -> str:
    """What the log has of it, to the line with these words."""
    before = len(server.log())
    server.process.send_signal(signal.SIGHUP)
    until_s = time.monotonic() + TIMEOUT_S
    while until not in (log := server.log()[before:]):
        assert time.monotonic() < until_s, log
        time.sleep(0.05)
    return log


def test_settings_of_the_file_and_models_of_the_repository_are_taken_anew(
    server: RunningServer, settings_file: Path, repository: Path
) -> None:
    before = everyone(server)
    settings_file.write_text('log_level = "debug"\n')
    shutil.copytree(repository / "vanilla" / "1", settings_file.parent / "repository" / "vanilla" / "1")
    roll(server, "all workers are new")
    assert not set(before) & set(everyone(server))
    with Client(server.target) as client:
        assert [(model.name, model.version) for model in client.models()] == [("accumulator", 1), ("vanilla", 1)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("max_streams = 0", "max_streams: Input should be greater than or equal to 1"),
        ('session_store = "redis"', "only a start of the whole service can change session_store"),
        ('snapshot_key_file = "/no/such/file"', "nothing is restarted: worker-"),
    ],
)
def test_what_cannot_be_taken_is_told_and_all_stays_as_it_was_for_those_that_die_later_too(
    server: RunningServer, settings_file: Path, line: str, complaint: str
) -> None:
    before = everyone(server)
    settings_file.write_text(f"{line}\n")
    assert complaint in roll(server, "nothing is restarted: ")
    eventually(lambda: everyone(server) == before)
    os.kill(before[-1], signal.SIGKILL)
    eventually(lambda: before[-1] not in everyone(server) and counted(server, "rnnserve_workers") == 2)
    with Client(server.target) as client, client.stream("accumulator") as stream:
        assert stream.step([1.0]).step == 0


def test_nothing_is_restarted_for_a_repository_with_a_wrong_bundle(server: RunningServer, settings_file: Path) -> None:
    before = everyone(server)
    wrong = settings_file.parent / "repository" / "wrong" / "1"
    wrong.mkdir(parents=True)
    assert "lane did not start" in roll(server, "nothing is restarted: ")
    assert everyone(server) == before
    shutil.rmtree(wrong.parent)


def test_nobody_is_blamed_for_a_pause_of_the_supervisor(server: RunningServer) -> None:
    before = everyone(server)
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(WORKER_TIMEOUT_S + 1)
    server.process.send_signal(signal.SIGCONT)
    time.sleep(WORKER_TIMEOUT_S)  # in which it asks several times
    assert everyone(server) == before
