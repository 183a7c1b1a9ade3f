"""The command `rnnserve top` against the real server."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from rnnserve import Client, RnnserveError
from rnnserve.cli import watching
from rnnserve.cli.app import app
from rnnserve.cli.outcome import stdout
from tests.support.server import RunningServer, free_port, start_server
from tests.support.wire import TIMEOUT_S, eventually, metric

pytestmark = pytest.mark.xdist_group("top")

RNNSERVE = str(Path(sys.executable).parent / "rnnserve")

Run = Callable[..., Result]
Meanwhile = Callable[[Callable[[], object]], None]


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[RunningServer]:
    """Of these tests alone, which count what is on it."""
    with start_server(repository) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


@pytest.fixture
def run(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process, on a terminal of 100 columns."""
    monkeypatch.setattr(stdout, "width", 100)

    def run(*arguments: str, target: str = server.target, url: str = server.metrics_url) -> Result:
        return CliRunner().invoke(app, ["--target", target, "top", "--metrics", url, *arguments])

    return run


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Between the two readings just this happens."""
    return lambda work: monkeypatch.setattr(watching, "sleep", lambda interval_s: work())


def about(model: str, version: int, done: Result) -> dict[str, Any]:
    assert (done.exit_code, done.stderr) == (0, "")
    (found,) = (
        each for each in json.loads(done.stdout)["models"] if (each["name"], each["version"]) == (model, version)
    )
    assert isinstance(found, dict)
    return found


def models_of(done: Result) -> list[str]:
    """Names and versions, line by line."""
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    heading = next(place for place, line in enumerate(lines) if line.startswith("model"))
    return [" ".join(line.split()[:2]) for line in lines[heading + 1 :]]


def test_scripts_get_what_streams_and_sequences_did_in_the_interval(
    run: Run, client: Client, meanwhile: Meanwhile
) -> None:
    with client.stream("vanilla", version=1) as one, client.stream("vanilla", version=1):
        one.step([1.0, 2.0, 3.0])  # before the interval

        def work() -> None:
            for _ in range(10):
                list(one.steps(np.ones((3, 3), np.float32)))
            client.predict("vanilla", [np.ones((4, 3), np.float32)] * 5, version=1)
            with pytest.raises(RnnserveError):
                client.predict("vanilla", [np.ones((4, 2), np.float32)])

        meanwhile(work)
        done = run("--once", "--json")
    found, totals = about("vanilla", 1, done), json.loads(done.stdout)
    duration_s = totals["duration_s"]
    assert found["streams"] == totals["streams"] == 2
    assert found["steps_per_s"] * duration_s == pytest.approx(30)
    assert found["sequences_per_s"] * duration_s == pytest.approx(5)
    assert found["tick_sessions"] == 1
    assert 0 < found["p50_s"] <= found["p99_s"] < duration_s
    assert totals["refusals_per_s"] == {"SHAPE_MISMATCH": pytest.approx(1 / duration_s)}
    assert totals["store_up"] is True
    assert totals["stream_limit"] == metric(totals["metrics"], "rnnserve_session_limit") > 0
    assert 0 < totals["uptime_s"] < 3_600
    idle = about("vanilla", 2, done)
    assert (idle["streams"], idle["steps_per_s"], idle["p50_s"]) == (0, 0, None)


def test_sessions_that_are_parked_are_counted(run: Run, client: Client, server: RunningServer) -> None:
    stream = client.stream("accumulator", session="left-alone")
    stream.open()
    stream.step([1.0])
    stream.abort()
    eventually(lambda: metric(server.metrics_url, "rnnserve_parked_sessions", model="accumulator", version="1") == 1)
    done = run("--once", "--json", "--interval-s", "0.1")
    assert (about("accumulator", 1, done)["parked"], json.loads(done.stdout)["parked"]) == (1, 1)
    client.delete_session("left-alone")


def test_every_model_that_is_served_is_a_line_within_100_columns(run: Run, client: Client) -> None:
    done = run("--once", "--interval-s", "0.1")
    assert models_of(done) == [f"{model.name} v{model.version}" for model in client.models()]
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_busiest_model_is_first_if_asked_for(run: Run, client: Client, meanwhile: Meanwhile) -> None:
    with client.stream("vanilla", version=2) as busy, client.stream("accumulator") as less:

        def work() -> None:
            busy.step([1.0, 2.0, 3.0])
            busy.step([1.0, 2.0, 3.0])
            less.step([1.0])

        meanwhile(work)
        assert models_of(run("--once", "--sort", "steps"))[:2] == ["vanilla v2", "accumulator v1"]
        assert models_of(run("--once", "--sort", "name"))[0] == "accumulator v1"


def test_models_are_chosen_by_a_part_of_their_name(run: Run) -> None:
    brief = ("--once", "--interval-s", "0.1", "--filter")
    assert models_of(run(*brief, "nill")) == ["vanilla v1", "vanilla v2"]
    assert "no model that is served has such a name" in run(*brief, "nobody").stdout


def test_json_for_all_commands_is_json_here_too(run: Run, server: RunningServer) -> None:
    arguments = ["--target", server.target, "--json", "top", "--once", "--interval-s", "0.1"]
    done = CliRunner().invoke(app, [*arguments, "--metrics", server.metrics_url])
    assert json.loads(done.stdout)["metrics"] == server.metrics_url


@pytest.mark.parametrize("once", [["--once"], []])
def test_a_page_that_cannot_be_reached_is_told_with_what_names_another(run: Run, once: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/metrics"
    done = run(*once, url=url)
    said = f"rnnserve: no metrics page at {url} (Connection refused); name the right one with --metrics\n"
    assert (done.exit_code, done.stdout, done.stderr) == (3, "", said)


def test_what_is_no_metrics_page_is_told_in_one_line(run: Run, server: RunningServer) -> None:
    done = run("--once", url=f"http://{server.target}/metrics")
    assert (done.exit_code, len(done.stderr.splitlines())) == (3, 1)
    assert "does not speak HTTP" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--json"], 2, "--json prints a single reading: it needs --once"),
        (["--metrics", "file:///etc/hosts"], 2, "--metrics is a URL such as http://localhost:9464/metrics"),
        (["--once", "--sort", "beauty"], 2, "beauty"),
        (["--once", "--interval-s", "0"], 2, "interval-s"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, arguments: list[str], code: int, complaint: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, complaint in done.stderr) == (code, True), done.stderr


def test_a_page_without_its_server_is_not_enough(run: Run) -> None:
    done = run("--once", target="localhost:1")
    assert (done.exit_code, "no server answers at localhost:1" in done.stderr) == (3, True)


class Terminal:
    """What a person sees who has started the command on a terminal of 100 columns."""

    def __init__(self, process: subprocess.Popen[bytes], screen: int) -> None:
        self.process = process
        self._screen = screen
        self._seen = b""

    def until(self, text: str) -> str:
        """What is drawn up to this text, from where the last call ended."""
        sought = text.encode()
        while sought not in self._seen:
            assert select.select([self._screen], [], [], TIMEOUT_S)[0], f"no {text!r} in {self._seen.decode()}"
            self._seen += os.read(self._screen, 65_536)
        seen, _, self._seen = self._seen.partition(sought)
        return (seen + sought).decode()

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(TIMEOUT_S)

    def rest(self) -> str:
        while select.select([self._screen], [], [], 0)[0]:
            try:
                self._seen += os.read(self._screen, 65_536)
            except OSError:  # Linux says so at the end
                break
        return self._seen.decode()


@contextmanager
def watching_on_a_terminal(*arguments: str) -> Iterator[Terminal]:
    screen, its_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "50"}
    command = [RNNSERVE, *arguments]
    process = subprocess.Popen(command, stdin=its_end, stdout=its_end, stderr=its_end, env=environment)
    os.close(its_end)
    try:
        yield Terminal(process, screen)
    finally:
        process.kill()
        process.wait()
        os.close(screen)


def test_a_terminal_shows_the_table_anew_until_ctrl_c(server: RunningServer, client: Client) -> None:
    at = ["--target", server.target, "top", "--metrics", server.metrics_url, "--interval-s", "0.2"]
    with watching_on_a_terminal(*at) as terminal:
        first = terminal.until("words ")
        assert "since its start" in first
        assert first.count("vanilla ") == 2
        with client.stream("vanilla"), client.stream("accumulator"):
            terminal.until("streams 2 of ")
        assert "over the last " in terminal.until("streams 0 of ")
        terminal.until("words ")
        assert terminal.interrupt() == 0
        assert "Traceback" not in terminal.rest()


def test_a_server_that_goes_away_is_told_and_found_again(repository: Path, tmp_path: Path) -> None:
    port, metrics_port = free_port(), free_port()
    url = f"http://127.0.0.1:{metrics_port}/metrics"
    at = ["--target", f"127.0.0.1:{port}", "top", "--metrics", url, "--interval-s", "0.2"]
    with (
        start_server(repository, tmp_path, port=port, metrics_port=metrics_port) as crashing,
        watching_on_a_terminal(*at) as terminal,
    ):
        terminal.until("words ")
        crashing.kill()
        terminal.until("; trying again")
        assert "words " in terminal.until("; trying again")  # what was known stays in sight
        with start_server(repository, tmp_path, port=port, metrics_port=metrics_port):
            terminal.until("over the last")
            terminal.until("over the last 0.2 s")
            assert "trying again" not in terminal.until("words ")
            assert terminal.interrupt() == 0
        assert "Traceback" not in terminal.rest()


def test_where_there_is_no_terminal_each_reading_is_printed_below_the_last_one(server: RunningServer) -> None:
    at = ["--target", server.target, "top", "--metrics", server.metrics_url, "--interval-s", "0.1"]
    pipe = subprocess.PIPE
    with subprocess.Popen([RNNSERVE, *at], stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout is not None
        headings = (line for line in running.stdout if line.startswith("rnnserve "))
        assert "since its start" in next(headings)
        assert all("over the last 0." in next(headings) for _ in range(2))
        running.send_signal(signal.SIGINT)
        rest, complaints = running.communicate(timeout=TIMEOUT_S)
    assert (running.returncode, complaints, "\x1b" in rest) == (0, "", False)
