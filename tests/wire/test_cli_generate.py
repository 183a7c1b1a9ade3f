"""The command `rnnserve generate` against the real server."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mido
import pytest
from typer.testing import CliRunner, Result

from rnnserve import Client
from rnnserve.cli.app import app
from tests.support.bundles import CHORDS, write_chorale, write_composer
from tests.support.server import RunningServer, start_server
from tests.support.wire import TIMEOUT_S, eventually, metric

pytestmark = pytest.mark.xdist_group("generate")

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("writers")
    write_composer(folder)
    write_composer(folder, "endless", end=None, max_symbols=100_000)
    write_chorale(folder)
    with start_server(folder) as running:
        yield running


@pytest.fixture
def run(server: RunningServer) -> Run:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["generate", *arguments], env={"RNNSERVE_TARGET": server.target})

    return run


def test_the_symbols_are_printed_and_how_to_get_the_same_again(server: RunningServer, run: Run) -> None:
    with Client(server.target) as client:
        output = client.generate("endless", "ab", seed=9, temperature=0.5, max_symbols=30, deterministic=True)
        assert len(list(output)) == 30
    given = ["--prompt", "ab", "--seed", "9", "--temperature", "0.5", "--max-symbols", "30", "--deterministic"]
    done = run("endless", *given)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{output.text}\n", "finish: max_symbols; seed: 9\n")


def test_what_a_model_writes_is_told(server: RunningServer) -> None:
    done = CliRunner().invoke(app, ["models", "composer"], env={"RNNSERVE_TARGET": server.target})
    assert "up to 500 symbols, from '.' on, until '.'" in done.stdout


def test_bounds_and_stops_are_sent(run: Run) -> None:
    done = run("endless", "--max-symbols", "20", "--top-k", "1", "--top-p", "0.5")
    assert (len(done.stdout), done.stderr.partition(";")[0]) == (21, "finish: max_symbols")
    done = run("endless", "--temperature", "10", "--stop", "aa", "--stop", "bb")
    assert done.stdout.strip()[-2:] in {"aa", "bb"}
    assert done.stderr.startswith("finish: stop")


def test_for_scripts_there_is_an_object_a_symbol_and_one_about_all(server: RunningServer) -> None:
    arguments = ["--json", "generate", "composer", "--seed", "9"]
    done = CliRunner().invoke(app, arguments, env={"RNNSERVE_TARGET": server.target})
    *symbols, last = map(json.loads, done.stdout.splitlines())
    assert [symbol["step"] for symbol in symbols] == list(range(len(symbols)))
    assert last == {"text": "".join(symbol["text"] for symbol in symbols), "finish": "end", "stop": None, "seed": 9}


def test_what_is_refused_is_one_line(run: Run) -> None:
    done = run("composer", "--prompt", "a?")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "'?'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert run("composer", "--temperature", "11").exit_code == 2


def notes(song: mido.MidiFile, voice: int) -> list[int]:
    return [message.note for message in song.tracks[voice] if message.type == "note_on"]


def test_a_tune_is_printed_and_written_with_its_prompt(run: Run, tmp_path: Path) -> None:
    midi, abc = tmp_path / "tune.mid", tmp_path / "tune.abc"
    done = run("chorale", "--prompt", CHORDS[1], "--max-symbols", "16", "--midi", str(midi), "--abc", str(abc))
    assert done.exit_code == 0
    words = [*CHORDS[1].split(), *done.stdout.split()]
    assert len(words) == 20
    song = mido.MidiFile(midi)
    for voice in range(4):
        assert notes(song, voice) == [int(word[1:]) for word in words[voice::4] if word[1:] != "-"]
    assert abc.read_text().startswith("X:1\nT:chorale\n")
    assert done.stderr.splitlines()[1:] == [f"wrote {midi}", f"wrote {abc}"]


def test_a_frame_without_its_end_is_left_out_of_the_file_and_told(run: Run, tmp_path: Path) -> None:
    done = run("chorale", "--max-symbols", "6", "--midi", str(tmp_path / "tune.mid"))
    assert done.exit_code == 0
    words = done.stdout.split()
    assert f"left out, for the frame has no end: {' '.join(words[4:])}" in done.stderr
    assert notes(mido.MidiFile(tmp_path / "tune.mid"), 0) == [int(words[0][1:])]


def test_what_is_no_tune_is_printed_all_the_same_and_said_to_be_none(run: Run, tmp_path: Path) -> None:
    done = run("composer", "--seed", "9", "--midi", str(tmp_path / "tune.mid"))
    assert done.exit_code == 2
    assert done.stdout == run("composer", "--seed", "9").stdout
    assert "this is no tune, so no file is written: word 0 is" in done.stderr
    assert not (tmp_path / "tune.mid").exists()


def test_a_file_that_could_not_be_written_is_refused_before_anything_is(run: Run, tmp_path: Path) -> None:
    done = run("chorale", "--abc", str(tmp_path / "nowhere" / "tune.abc"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "there is no such folder" in done.stderr
    done = run("chorale", "--midi", str(tmp_path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "this is a folder" in done.stderr


def test_without_the_library_midi_is_refused_before_anything_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mido", None)  # as if it were not installed
    done = run("chorale", "--midi", str(tmp_path / "tune.mid"))
    assert (done.exit_code, done.stdout) == (2, "")
    assert "pip install 'rnnserve[music]'" in done.stderr


def test_ctrl_c_ends_the_output_on_the_server_and_the_line(server: RunningServer) -> None:
    command = [sys.executable, "-c", "from rnnserve.cli import main; main()", "--target", server.target]
    process = subprocess.Popen([*command, "generate", "endless"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    assert process.stdout.read().endswith("\n")
    assert process.wait(TIMEOUT_S) == 130
    labels = {"model": "endless", "version": "1"}
    eventually(lambda: metric(server.metrics_url, "rnnserve_generations", **labels) == 0)
