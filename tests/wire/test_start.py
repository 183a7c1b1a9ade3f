import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.server import ROOT, start_server
from tests.support.wire import eventually

START_TIMEOUT_S = 60.0


def start(*flags: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """A server that is to end by itself, with a state folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"port": 0, "metrics_port": 0, "state_dir": folder} | variables
        return subprocess.run(
            [sys.executable, "-m", "service", *flags],
            cwd=ROOT,
            env=os.environ | {f"RNNSERVE_{name.upper()}": str(value) for name, value in given.items()},
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )


@pytest.fixture
def port_in_use() -> Iterator[int]:
    """Its owner would share it with anybody who asks to."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        yield taken.getsockname()[1]


def assert_refused(ended: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and a sentence, without a traceback or a line of gRPC's own."""
    assert ended.returncode == 2, ended.stderr
    (sentence,) = ended.stderr.splitlines()
    assert sentence.startswith("rnnserve: ")
    for part in parts:
        assert part in sentence


def test_a_port_in_use_is_refused_by_its_number(repository: Path, port_in_use: int) -> None:
    ended = start(model_repository=repository, port=port_in_use)
    assert_refused(ended, f"port: {port_in_use} on 127.0.0.1 is in use by another program")


def test_a_metrics_port_in_use_is_refused_by_its_number(repository: Path, port_in_use: int) -> None:
    ended = start(model_repository=repository, metrics_port=port_in_use)
    assert_refused(ended, f"metrics_port: {port_in_use} on 127.0.0.1 is in use by another program")


@pytest.mark.parametrize(
    ("host", "cause"),
    [
        ("192.0.2.1", "host: 192.0.2.1 is no address of this machine"),  # one of those kept for documentation
        ("nonsense.invalid", "host: 'nonsense.invalid' cannot be resolved"),
        ("n" * 64, "cannot be resolved"),
    ],
)
def test_a_host_that_cannot_be_bound_is_refused_with_the_cause(repository: Path, host: str, cause: str) -> None:
    assert_refused(start(model_repository=repository, host=host), cause)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_server_listens_on_an_ipv6_address(repository: Path) -> None:
    with start_server(repository, host="::1") as server, socket.create_connection(("::1", server.port), timeout=5):
        pass


def test_a_missing_repository_is_refused_by_its_name(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert_refused(start(model_repository=missing), "model_repository:", str(missing))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_missing_folder_for_long_sequences_is_refused_by_its_name(
    repository: Path, tmp_path: Path, workers: int
) -> None:
    missing = tmp_path / "nowhere"
    assert_refused(start(model_repository=repository, spill_dir=missing, workers=workers), "spill_dir:", str(missing))


def test_a_damaged_bundle_is_refused_by_its_field(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "text", tmp_path / "text")
    weights = tmp_path / "text" / "1" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_refused(start(model_repository=tmp_path), str(tmp_path / "text" / "1"), "weights_sha256")


def test_a_network_larger_than_memory_is_refused_by_its_field(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "text", tmp_path / "text")
    file = tmp_path / "text" / "1" / "manifest.json"
    file.write_text(file.read_text().replace('"hidden_size": 8', '"hidden_size": 1000000000'))
    assert_refused(start(model_repository=tmp_path), str(file.parent), "network: hidden_size is 1000000000")


def test_a_missing_settings_file_is_refused_by_its_name(tmp_path: Path) -> None:
    missing = tmp_path / "rnnserve.toml"
    assert_refused(start(settings_file=missing), "RNNSERVE_SETTINGS_FILE", str(missing))


def test_an_unreadable_settings_file_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "rnnserve.toml"
    file.write_text("port = = 1")
    assert_refused(start(settings_file=file), "RNNSERVE_SETTINGS_FILE", str(file), "cannot be read")


def test_a_wrong_setting_is_refused_with_its_bound() -> None:
    assert_refused(start(max_sessions=0), "max_sessions:", "1")


def test_an_unknown_variable_is_refused() -> None:
    assert_refused(start(prt=1), "RNNSERVE_PRT", "RNNSERVE_PORT")


def test_an_unknown_flag_is_refused() -> None:
    ended = start("--prot", "1")
    assert ended.returncode == 2
    assert "--prot" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_names_the_settings_and_their_meaning() -> None:
    ended = start("--help")
    assert ended.returncode == 0
    assert "--drain-timeout-s" in ended.stdout
    assert "gRPC port" in ended.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_bfloat16_weights_that_were_never_measured_are_refused(repository: Path, workers: int) -> None:
    ended = start(model_repository=repository, bfloat16_models="stacked", workers=workers)
    assert ended.returncode == 2
    assert "stacked/1: bfloat16.json: what bfloat16 loses was never measured" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("device", "workers"), [("cpv", 1), ("cuda:99", 1), ("meta", 1), ("cpv", 2)])
def test_a_device_that_torch_cannot_use_is_refused_by_its_name(repository: Path, device: str, workers: int) -> None:
    ended = start(model_repository=repository, device=device, workers=workers)
    assert ended.returncode == 2
    assert f"device: '{device}' cannot be used: " in ended.stderr
    assert "Traceback" not in ended.stderr


def imports_torch(process: subprocess.Popen[str]) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def starts_the_lane(process: subprocess.Popen[str]) -> bool:
    return any("spawn_main" in command_of(pid) for pid in children(process.pid))


def starts_the_lane_of_all(process: subprocess.Popen[str]) -> bool:
    return any("service.lane" in command_of(pid) for pid in children(process.pid))


def starts_workers(process: subprocess.Popen[str]) -> bool:
    return any("service.worker" in command_of(pid) for pid in children(process.pid))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_for_the_log_in_the_midst_of_the_start_changes_nothing(
    repository: Path, tmp_path: Path, number: int
) -> None:
    command = [sys.executable, "-m", "service", "--port", "0", "--metrics-port", "0", "--state-dir", str(tmp_path)]
    with subprocess.Popen(
        [*command, "--model-repository", str(repository)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        eventually(lambda: imports_torch(process))
        process.send_signal(number)
        eventually((tmp_path / "server.json").exists)
        process.terminate()
        process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("begun", "workers"), [(imports_torch, 1), (starts_the_lane, 1), (starts_the_lane_of_all, 2), (starts_workers, 2)]
)
def test_a_signal_to_all_processes_in_the_midst_of_the_start_ends_them_without_a_complaint(
    repository: Path, tmp_path: Path, begun: Callable[[subprocess.Popen[str]], bool], workers: int, number: int
) -> None:
    command = [sys.executable, "-m", "service", "--port", "0", "--metrics-port", "0", "--state-dir", str(tmp_path)]
    with subprocess.Popen(
        [*command, "--model-repository", str(repository), "--workers", str(workers)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        eventually(lambda: begun(process))
        started = children(process.pid)
        os.killpg(process.pid, number)  # as a terminal does
        if number == signal.SIGTERM:  # as a service manager does, who knows the processes of other groups, too
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        _, said = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 0, said
    assert not (tmp_path / "server.json").exists()
    for complaint in ("Traceback", '"level": "error"', "did not start", "metrics on"):
        assert complaint not in said
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))


def children(pid: int) -> list[int]:
    """Of all of its threads. Linux only."""
    with suppress(FileNotFoundError, ProcessLookupError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def command_of(pid: int) -> str:
    """Empty once it has gone."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""
