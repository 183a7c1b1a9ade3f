"""The command `rnnserve` against the real server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rnnserve import AsyncClient, Client, SessionNotFound
from rnnserve.cli.app import app, stdout
from tests.support.server import RunningServer

CSV = "feature 2,feature 0,feature 1\n3,1,2\n6,4,5\n"
LABELS = {"north", "east", "south", "west"}

Run = Callable[..., Result]


@pytest.fixture
def run(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process, on a wide terminal."""
    monkeypatch.setattr(stdout, "width", 200)

    def run(*arguments: str, stdin: str = "", target: str = server.target) -> Result:
        return CliRunner().invoke(app, arguments, input=stdin, env={"RNNSERVE_TARGET": target})

    return run


@pytest.fixture
def steps_file(tmp_path: Path) -> str:
    file = tmp_path / "steps.csv"
    file.write_text(CSV)
    return str(file)


def lines_of_json(done: Result) -> list[dict[str, object]]:
    assert (done.exit_code, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_models_are_a_table_for_people_and_lines_for_scripts(run: Run) -> None:
    table = run("models").stdout
    assert "vanilla v2" in table
    assert "lstm, 1 layer, bidirectional" in table
    listed = [(model["name"], model["version"]) for model in lines_of_json(run("--json", "models"))]
    assert listed[-1] == ("vanilla", 2)


def test_all_about_one_model_says_why_it_cannot_stream(run: Run) -> None:
    details = run("models", "bidirectional").stdout
    assert "both ends" in details
    assert "feature 0, feature 1, feature 2" in details


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_stream_answers_after_each_step(run: Run, steps_file: str, source: str) -> None:
    done = run("stream", "vanilla", steps_file) if source == "file" else run("stream", "vanilla", stdin=CSV)
    assert done.exit_code == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["0", "1"]
    assert {row[1] for row in rows} <= LABELS


def test_columns_are_found_by_name(run: Run, steps_file: str) -> None:
    by_name = run("--json", "stream", "vanilla", steps_file)
    by_place = run("--json", "stream", "vanilla", stdin="1,2,3\n4,5,6\n")
    assert lines_of_json(by_name) == lines_of_json(by_place)


def test_a_stream_for_scripts_is_an_object_a_step(run: Run) -> None:
    first, second = lines_of_json(run("--json", "stream", "text", "-", stdin="ab\n"))
    assert (first["step"], second["step"]) == (0, 1)
    probabilities = first["probabilities"]
    assert isinstance(probabilities, dict)
    assert set(probabilities) == LABELS
    assert max(probabilities, key=lambda label: probabilities[label]) == first["label"]


def test_a_stream_can_be_paced(run: Run, steps_file: str) -> None:
    assert len(run("stream", "vanilla", steps_file, "--rate", "1000").stdout.splitlines()) == 2


def test_real_time_needs_a_model_with_a_rate(run: Run, steps_file: str) -> None:
    done = run("stream", "vanilla", steps_file, "--real-time")
    assert done.exit_code == 2
    assert "--rate" in done.stderr


def test_whole_sequences_are_predicted_a_file_each(run: Run, steps_file: str) -> None:
    done = run("predict", "bidirectional", steps_file, steps_file)
    assert done.exit_code == 0
    assert [line.split("\t")[0] in ("yes", "no") for line in done.stdout.splitlines()] == [True, True]


def test_json_lines_of_sequences_are_many(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("[[1, 2, 3]]\n[[4, 5, 6], [7, 8, 9]]\n")
    predictions = lines_of_json(run("--json", "predict", "stacked", str(file)))
    assert [len(outputs) for prediction in predictions if isinstance(outputs := prediction["outputs"], list)] == [1, 2]


def test_health_is_told_by_word_and_by_exit_code(run: Run) -> None:
    assert (run("health").stdout, run("health").exit_code) == ("serving\n", 0)
    assert lines_of_json(run("--json", "health", "text")) == [{"model": "text", "status": "serving"}]


def test_sessions_are_listed_told_about_and_erased(run: Run, server: RunningServer) -> None:
    with Client(server.target) as client:
        stream = client.stream("accumulator", session="seen-from-the-command-line")
        stream.open()
        stream.step([1.0])
        assert "seen-from-the-command-line  accumulator v1  live" in run("sessions").stdout
        (info,) = lines_of_json(run("--json", "sessions", stream.session))
        assert (info["id"], info["live"], info["next_step"]) == (stream.session, True, 1)
        assert run("sessions", stream.session, "--delete").exit_code == 0
        with pytest.raises(SessionNotFound):
            stream.step([2.0])
    gone = run("sessions", stream.session)
    assert (gone.exit_code, "SESSION_NOT_FOUND" in gone.stderr) == (1, True)


async def test_a_program_sees_the_same(server: RunningServer) -> None:
    async with AsyncClient(server.target) as client:
        async with client.stream("accumulator", session="seen-by-a-program") as stream:
            await stream.step([1.0])
            info = await client.session(stream.session)
            assert (info.model, info.version, info.live, info.next_step) == ("accumulator", 1, True, 1)
            assert info.id in [found.id for found in await client.sessions()]
        with pytest.raises(SessionNotFound):
            await client.delete_session("seen-by-a-program")


def test_samples_are_saved_so_that_they_can_be_streamed(
    run: Run, trained_server: RunningServer, tmp_path: Path
) -> None:
    target = trained_server.target
    saved = run("samples", "speaker", "--save", str(tmp_path), target=target)
    assert saved.exit_code == 0
    file = sorted(tmp_path.iterdir())[0]
    assert "speaker" in run("stream", "speaker", str(file), target=target).stdout
    sample = lines_of_json(run("--json", "samples", "speaker", target=target))[0]
    assert sample["name"] == file.stem


def test_the_demo_tells_the_whole_story(run: Run, trained_server: RunningServer) -> None:
    done = run("demo", "--fast", target=trained_server.target)
    assert done.exit_code == 0
    for part in ("activity", "speaker", "held-out recordings right", "MODEL_NOT_STREAMABLE", "both ends"):
        assert part in done.stdout
    assert "skipped" not in done.stdout


def test_the_demo_skips_what_is_not_served(run: Run) -> None:
    done = run("demo", "--fast")
    assert done.exit_code == 1
    assert "no model 'activity': skipped" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "complaint"),
    [
        (["models", "nobody"], "", 1, "MODEL_NOT_FOUND"),
        (["health", "nobody"], "", 1, "MODEL_NOT_FOUND"),
        (["stream", "bidirectional"], "", 1, "rnnserve predict"),
        (["stream", "text"], "axb", 1, "UNKNOWN_SYMBOL"),
        (["stream", "vanilla"], "1,2\n", 2, "line 1: 2 values"),
        (["stream", "vanilla"], "", 2, "holds no step"),
        (["stream", "vanilla", "/no/such/file"], "", 2, "/no/such/file"),
        (["stream", "vanilla", "--rate", "0"], "", 2, "rate"),
        (["predict", "vanilla", "/no/such/file"], "", 2, "/no/such/file"),
        (["--target", "example.com:1", "--token", "x", "health"], "", 2, "only over TLS"),
        (["--target", "localhost:1", "health"], "", 3, "no server answers at localhost:1"),
        (["unknown"], "", 2, "unknown"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line_and_by_exit_code(
    run: Run, arguments: list[str], stdin: str, code: int, complaint: str
) -> None:
    done = run(*arguments, stdin=stdin)
    assert done.exit_code == code, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    if "Usage" not in done.stderr:
        assert len(done.stderr.splitlines()) == 1


def test_answers_before_a_refused_step_are_printed(run: Run) -> None:
    done = run("stream", "text", stdin="abx")
    assert len(done.stdout.splitlines()) == 2


@pytest.fixture
def shell(server: RunningServer) -> Callable[[str], subprocess.Popen[str]]:
    """Starts a line of shell in which `rnnserve` is the command in a process of its own."""

    def shell(line: str) -> subprocess.Popen[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        pipe = subprocess.PIPE
        environment = os.environ | {"RNNSERVE_TARGET": server.target, "PATH": path}
        return subprocess.Popen(["sh", "-c", line], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    return shell


def test_ctrl_c_ends_quietly(shell: Callable[[str], subprocess.Popen[str]]) -> None:
    running = shell("exec rnnserve stream vanilla")
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write("1,2,3\n")
    running.stdin.flush()
    assert running.stdout.readline().startswith("0\t")
    running.send_signal(signal.SIGINT)
    _, complaints = running.communicate(timeout=20)
    assert (running.returncode, complaints) == (130, "")


def test_a_reader_that_has_seen_enough_is_no_error(shell: Callable[[str], subprocess.Popen[str]]) -> None:
    answers, complaints = shell("rnnserve stream vanilla | head -1").communicate("1,2,3\n" * 500, timeout=30)
    assert (len(answers.splitlines()), complaints) == (1, "")
