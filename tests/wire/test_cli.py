"""The command `rnnserve` against the real server."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from rnnserve import AsyncClient, Client, Notice, SessionInfo, SessionNotFound
from rnnserve.cli.app import app
from rnnserve.cli.live import StreamView
from rnnserve.cli.outcome import stdout, tell
from rnnserve.cli.show import models_table, notice_line, print_whole, sessions_table
from rnnserve.models import model_from
from rnnserve.v1 import model_service_pb2 as pb
from tests.support.server import RunningServer, free_port, start_server
from tests.support.wire import metric

CSV = "feature 2,feature 0,feature 1\n3,1,2\n6,4,5\n"
STREAM = {"grpc_type": "bidi_stream", "grpc_service": "rnnserve.v1.RealTimeService", "grpc_method": "StreamSteps"}
LABELS = {"north", "east", "south", "west"}

Run = Callable[..., Result]
Shell = Callable[[str], subprocess.Popen[str]]


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


@contextmanager
def no_session_left(server: RunningServer) -> Iterator[None]:
    """At the end of the block there is no session that was not there at its beginning."""
    with Client(server.target) as client:
        before = {info.id for info in client.sessions()}
        yield
        assert {info.id for info in client.sessions()} <= before


def lines_of_json(done: Result) -> list[dict[str, object]]:
    assert (done.exit_code, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def printed(draw: Callable[[Console], None]) -> str:
    """What is seen on a screen of 80 columns."""
    seen = io.StringIO()
    draw(Console(file=seen, width=80))
    return seen.getvalue()


def test_models_are_a_table_for_people_and_lines_for_scripts(run: Run) -> None:
    table = run("models").stdout
    assert "vanilla v2" in table
    assert "lstm, 1 layer, bidirectional" in table
    listed = [(model["name"], model["version"]) for model in lines_of_json(run("--json", "models"))]
    assert listed[-2:] == [("vanilla", 2), ("words", 1)]


def test_the_table_of_models_says_it_all_in_few_lines_of_80_columns() -> None:
    quality = pb.Quality(metric="accuracy on windows of 4 s, percent", value=95.55)
    summary = "Tells which exercise it is. " * 4
    model = pb.Model(name="exercises", summary=summary, quality=quality, layers=2, streamable=True, look_ahead=5)
    model.cell, model.direction = pb.CELL_GRU, pb.DIRECTION_FORWARD
    _heading, *lines = printed(lambda screen: screen.print(models_table([model_from(model)]))).splitlines()
    said = " ".join(" ".join(lines).split())
    assert "streams, 5 behind · gru, 2 layers, forward · 95.55 accuracy on windows of 4 s, percent" in said
    assert len(lines) <= 4


@pytest.mark.parametrize("name", ["bidirectional", "s" * 64])
def test_names_are_whole_however_narrow_the_terminal_is(name: str) -> None:
    said = "so much that can be said about it " * 3
    table = models_table([model_from(pb.Model(name=name, version=12, summary=said))])
    assert f"{name} v12" in printed(lambda screen: screen.print(table))


def test_a_session_is_one_line_and_whole_however_narrow_the_terminal_is() -> None:
    used_at = datetime(2026, 11, 24, tzinfo=UTC)
    session = SessionInfo("s" * 128, "accumulator", 12, True, 12_345, used_at, used_at, 678)
    _, line = printed(lambda screen: print_whole(screen, sessions_table([session]))).splitlines()
    assert line.split()[:5] == ["s" * 128, "accumulator", "v12", "live", "12,345"]
    assert line.split()[-1] == "678"


def test_all_about_one_model_says_why_it_cannot_stream(run: Run) -> None:
    details = run("models", "bidirectional").stdout
    assert "both ends" in details
    assert "feature 0, feature 1, feature 2" in details


def test_all_about_a_model_of_words_shows_some_of_them_and_what_others_are(run: Run) -> None:
    details = run("models", "words").stdout
    assert "a word of 307: (unknown) the film is not good bad word0" in details
    assert "are read as '(unknown)'" in details
    assert "word299" not in details
    assert "a character of 4: 'abc '" in run("models", "text").stdout


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_stream_answers_after_each_step(run: Run, steps_file: str, source: str) -> None:
    done = run("stream", "vanilla", steps_file) if source == "file" else run("stream", "vanilla", stdin=CSV)
    assert done.exit_code == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["0", "1"]
    assert {row[1] for row in rows} <= LABELS


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_a_stream_of_words_ends_with_the_number_that_a_prediction_prints(run: Run, tmp_path: Path, source: str) -> None:
    file = tmp_path / "review.txt"
    file.write_text("The film is\nnot GOOD,\n")
    done = run("stream", "words", str(file)) if source == "file" else run("stream", "words", stdin=file.read_text())
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [["0", "The"], ["1", "film"], ["2", "is"], ["3", "not"], ["4", "GOOD,"]]
    assert float(run("predict", "words", str(file)).stdout) == pytest.approx(float(rows[-1][2]), abs=1e-5)


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


def test_a_stream_says_a_dash_or_null_where_the_model_is_less_sure_than_the_threshold(
    run: Run, steps_file: str
) -> None:
    plain = [line.split("\t") for line in run("stream", "vanilla", steps_file).stdout.splitlines()]
    unsure = [line.split("\t") for line in run("stream", "vanilla", steps_file, "--threshold", "1").stdout.splitlines()]
    assert unsure == [[step, "—", probability] for step, _, probability in plain]
    assert [
        line["label"] for line in lines_of_json(run("--json", "stream", "text", "--threshold", "1", stdin="ab"))
    ] == [
        None,
        None,
    ]


def test_a_prediction_says_a_dash_or_null_where_the_model_is_less_sure_than_the_threshold(run: Run) -> None:
    assert run("predict", "text", "--text", "ab c", "--threshold", "1").stdout == "— — — —\n"
    (unsure,) = lines_of_json(run("--json", "predict", "text", "--text", "ab c", "--threshold", "1"))
    assert (unsure["label"], unsure["labels"]) == (None, [None] * 4)


@pytest.mark.parametrize("command", ["stream", "predict"])
def test_a_threshold_is_a_probability_of_a_label(run: Run, steps_file: str, command: str) -> None:
    assert run(command, "vanilla", steps_file, "--threshold", "1.5").exit_code == 2
    refused = run(command, "stacked", steps_file, "--threshold", "0.5")
    assert (refused.exit_code, "has no labels" in refused.stderr) == (1, True)


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


def test_a_text_is_predicted_without_a_file_and_behind_those_of_files(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ab c")
    of_file, of_text = run("predict", "text", str(file)).stdout, run("predict", "text", "--text", "ca").stdout
    assert (len(of_file.split()), len(of_text.split())) == (4, 2)
    assert run("predict", "text", "--text", "ca", str(file), "--text", "ab c").stdout == of_file + of_text + of_file


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


def test_a_model_is_taken_out_of_service_and_back(run: Run, server: RunningServer) -> None:
    with Client(server.target) as client, client.stream("vanilla", version=1):
        refused = run("unload", "vanilla", "--version", "1")
        assert (refused.exit_code, "MODEL_IN_USE" in refused.stderr, "--end-streams" in refused.stderr) == (
            1,
            True,
            True,
        )
    assert run("unload", "vanilla", "--version", "2").stdout == "vanilla/2 is served no more\n"
    try:
        assert "vanilla v2" not in run("models").stdout
    finally:
        assert run("load", "vanilla").stdout == "vanilla/2 is served\n"
    assert lines_of_json(run("--json", "unload", "stacked")) == [{"name": "stacked", "version": 1}]
    (loaded,) = lines_of_json(run("--json", "load", "stacked"))
    assert (loaded["name"], loaded["version"]) == ("stacked", 1)


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
        (
            ["stream", "vanilla"],
            "feature 2,feature 0,feature 1,x\n1,2,3\n",
            2,
            "line 2: 3 values, but the header has 4",
        ),
        (
            ["stream", "vanilla"],
            "feature 2,feature 0,feature 1\n1,2,3,4\n",
            2,
            "line 2: 4 values, but the header has 3",
        ),
        (["stream", "vanilla"], "1,2,3\n\n1,nan,3\n", 1, "NOT_FINITE: standard input, line 3: nan as 'feature 1'"),
        (["stream", "vanilla"], "1,2,3\n1,1e300,3\n", 2, "standard input, line 2: 1e300 does not fit float32"),
        (["stream", "text"], "ab\nax", 1, "UNKNOWN_SYMBOL: standard input, line 2: 'x' is none of"),
        (["stream", "vanilla"], "", 2, "standard input holds no step"),
        (["stream", "vanilla", "/no/such/file"], "", 2, "/no/such/file"),
        (["stream", "vanilla", "--rate", "0"], "", 2, "rate"),
        (["predict", "vanilla", "/no/such/file"], "", 2, "/no/such/file"),
        (["predict", "text"], "", 2, "name a FILE, or give a --text"),
        (["predict", "text", "--text", "ab", "--text", "ax"], "", 1, "UNKNOWN_SYMBOL: 'ax': 'x' is none of"),
        (["predict", "vanilla", "--text", "ab"], "", 1, "INPUT_KIND_MISMATCH"),
        (["predict", "text", "--text", "ab", "--beam", "17"], "", 2, "--beam"),
        (["--target", "example.com:1", "--token", "x", "health"], "", 2, "only over TLS"),
        (["--target", "localhost:1", "health"], "", 3, "no server answers at localhost:1"),
        (["--target", "", "health"], "", 2, "the target '' names no host"),
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


@pytest.mark.parametrize(
    ("bad", "code", "complaint"),
    [
        ("feature 0,feature 1,feature 2\n1,2,3\n1,nan,3\n", 1, "NOT_FINITE: {file}, line 3: nan as 'feature 1'"),
        ("feature 0,feature 1,feature 2,x\n1,2,3,4\n1,2,3\n", 2, "{file}, line 3: 3 values, but the header has 4"),
        ("feature 0,feature 1,feature 2\n1,2,3\n1,2,3,4\n", 2, "{file}, line 3: 4 values, but the header has 3"),
        ("1,2,3\n1,1e300,3\n", 2, "{file}, line 2: 1e300 does not fit float32, which ends at 3.4e38"),
        ("", 2, "{file} holds no step"),
        ("feature 0,feature 1,feature 2\n", 2, "{file} holds no step"),
    ],
)
def test_a_bad_file_is_refused_alike_by_stream_and_among_others_by_predict(
    run: Run, steps_file: str, tmp_path: Path, bad: str, code: int, complaint: str
) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(bad)
    said = f"rnnserve: {complaint.format(file=file)}\n"
    for done in run("stream", "vanilla", str(file)), run("predict", "vanilla", steps_file, str(file), steps_file):
        assert (done.exit_code, done.stderr) == (code, said)


@pytest.mark.parametrize(
    "text", ["1,2\n", "1,2,3\nx,2,3\n", "1,2,3\n" * 50 + "1,nan,3\n" + "1,2,3\n" * 50, "", "1,2,3\n"]
)
def test_a_stream_leaves_no_session_behind_however_it_ends(
    run: Run, server: RunningServer, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "steps.csv"
    file.write_text(text)
    with no_session_left(server):
        run("stream", "vanilla", str(file))
        run("stream", "vanilla", stdin=text)


def test_without_a_step_no_session_is_opened(run: Run, server: RunningServer) -> None:
    before = metric(server.metrics_url, "grpc_server_started_total", **STREAM)
    assert run("stream", "vanilla", stdin="").exit_code == 2
    assert metric(server.metrics_url, "grpc_server_started_total", **STREAM) == before


def test_answers_before_a_refused_step_are_printed(run: Run) -> None:
    done = run("stream", "text", stdin="abx")
    assert len(done.stdout.splitlines()) == 2


@pytest.fixture
def shell(server: RunningServer) -> Shell:
    """Starts a line of shell in which `rnnserve` is the command in a process of its own."""

    def shell(line: str) -> subprocess.Popen[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        pipe = subprocess.PIPE
        environment = os.environ | {"RNNSERVE_TARGET": server.target, "PATH": path}
        return subprocess.Popen(["sh", "-c", line], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    return shell


@contextmanager
def streaming(shell: Shell, options: str = "") -> Iterator[subprocess.Popen[str]]:
    """A command that has answered one step and waits for the next one."""
    with shell(f"exec rnnserve {options} stream vanilla") as running:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write("1,2,3\n")
        running.stdin.flush()
        assert running.stdout.readline().startswith("0\t")
        yield running


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_quietly_and_its_session(
    shell: Shell, server: RunningServer, number: signal.Signals, code: int
) -> None:
    with no_session_left(server), streaming(shell) as running:
        running.send_signal(number)
        _, complaints = running.communicate(timeout=20)
        assert (running.returncode, complaints) == (code, "")


def test_ctrl_c_does_not_wait_for_a_server_that_hangs(shell: Shell, repository: Path) -> None:
    with start_server(repository) as hanging, streaming(shell, f"--target {hanging.target}") as running:
        hanging.process.send_signal(signal.SIGSTOP)
        try:
            began_s = time.monotonic()
            running.send_signal(signal.SIGINT)
            _, complaints = running.communicate(timeout=20)
            assert (running.returncode, complaints) == (130, "")
            assert time.monotonic() - began_s < 10
        finally:
            hanging.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("source", ["steps.csv", "- < steps.csv"])
def test_a_reader_that_has_seen_enough_is_no_error_and_ends_the_session(
    shell: Shell, server: RunningServer, tmp_path: Path, source: str
) -> None:
    (tmp_path / "steps.csv").write_text("1,2,3\n" * 5_000)
    with no_session_left(server):
        answers, complaints = shell(f"cd {tmp_path}; rnnserve stream vanilla {source} | head -1").communicate(
            timeout=30
        )
    assert (len(answers.splitlines()), complaints) == (1, "")


def test_tls_to_a_server_without_it_is_told_in_one_sentence(shell: Shell, server: RunningServer) -> None:
    _, complaints = shell("rnnserve --tls models").communicate(timeout=30)
    assert complaints == (
        f"rnnserve: TLS with {server.target} failed: what answers there does not speak it; connect without TLS\n"
    )


def test_the_log_of_grpc_is_there_for_whoever_asks_for_it(shell: Shell) -> None:
    _, complaints = shell("GRPC_VERBOSITY=info rnnserve --tls models").communicate(timeout=30)
    assert "Handshake failed" in complaints


def test_a_drain_is_announced_with_what_the_stream_does_then(shell: Shell, repository: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.csv").write_text("1,2,3\n" * 5_000)
    with start_server(repository, drain_timeout_s=5) as draining:
        command = f"exec rnnserve --target {draining.target} stream vanilla {tmp_path}/steps.csv --rate 100"
        with shell(command) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            running.stdout.readline()
            draining.terminate()
            told = running.stderr.readline()
            running.send_signal(signal.SIGINT)
            running.communicate(timeout=20)
    assert told.startswith("the server is shutting down")
    assert told.endswith("; the stream goes on by itself once a server answers again\n")


def test_a_stream_whose_session_is_kept_nowhere_is_not_said_to_go_on() -> None:
    assert notice_line(Notice("draining", "going", 2.5), "none") == "going"


@pytest.mark.parametrize(("is_terminal", "place"), [(True, "above the picture"), (False, "standard error")])
def test_what_is_told_beside_a_picture_can_be_read(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, place: str
) -> None:
    errors, picture = io.StringIO(), io.StringIO()
    monkeypatch.setattr(errors, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", errors)
    with StreamView(model_from(pb.Model(name="vanilla")), "title").on(Console(file=picture, force_terminal=True)):
        tell("interrupted")
    found = {"above the picture": picture.getvalue(), "standard error": errors.getvalue()}
    assert [name for name, text in found.items() if "interrupted\n" in text] == [place]


def test_a_crash_is_told_while_it_lasts_and_every_step_is_answered(
    shell: Shell, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "steps.csv").write_text("1,2,3\n" * 300)
    port = free_port()
    command = f"exec rnnserve --target 127.0.0.1:{port} stream vanilla {tmp_path}/steps.csv --rate 100"
    with start_server(repository, tmp_path, port=port) as crashing:
        running = shell(command)
        assert running.stdout is not None
        assert running.stderr is not None
        first = running.stdout.readline()
        crashing.kill()
        interrupted = running.stderr.readline()
    with start_server(repository, tmp_path, port=port):
        answers, complaints = running.communicate(timeout=30)
    assert interrupted.startswith(
        f"the stream is interrupted and tries to resume: no server answers at 127.0.0.1:{port} ("
    )
    assert "python -m service" not in interrupted
    assert re.fullmatch(r"the stream goes on with step \d+\n", complaints)
    assert running.returncode == 0
    assert [line.split("\t")[0] for line in (first + answers).splitlines()] == [str(step) for step in range(300)]
