"""What people would use instead, each in a virtual environment of its own, on the servers' core."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.progress import Progress

from benchmarks.network import FEATURES, MODEL, OUTPUTS, weights_file
from benchmarks.peers import KSERVE, MOSEC, TRITON
from benchmarks.processes import SERVER_CORE, on_core
from benchmarks.turns import Server, last_line
from tests.support.server import free_port

PROJECT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = PROJECT / "build" / "peers"
COMMON_PACKAGES = ("numpy", "safetensors")
START_UP_S = 120.0
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
Work = Literal["steps", "sequences"]
TRITON_BATCHING: dict[Work, str] = {
    "steps": f"""
max_batch_size: 256
input [{{ name: "x" data_type: TYPE_FP32 dims: [{FEATURES}] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [{OUTPUTS}] }}]
sequence_batching {{
  max_sequence_idle_microseconds: 60000000
  oldest {{ max_candidate_sequences: 1024 }}
  control_input [
    {{ name: "ID" control [{{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 }}] }},
    {{ name: "END" control [{{ kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1] }}] }}
  ]
}}
""",
    "sequences": f"""
max_batch_size: 64
input [{{ name: "x" data_type: TYPE_FP32 dims: [-1, {FEATURES}] allow_ragged_batch: true }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [-1, {OUTPUTS}] }}]
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
""",
}
TRITON_CONFIG = f"""
name: "{MODEL}"
backend: "python"
instance_group [{{ count: 1 kind: KIND_CPU }}]
"""
MOSEC_LIMITS = ("--timeout", "120000", "--capacity", "10000")
"""Milliseconds and requests: those of its default refuse what waits long in a benchmark's open loop."""


class PeerUnavailable(Exception):
    """It cannot be installed or started here; says why."""


@dataclass(frozen=True)
class Command:
    """What starts a server, and where it listens then."""

    arguments: Sequence[str]
    port: int
    variables: Mapping[str, str]


@dataclass(frozen=True)
class Peer:
    """One of them."""

    name: str
    packages: tuple[str, ...]
    command: Callable[[Work, Path, Path, Path], Command]
    """For such work; of the environment, the repository of bundles, and a folder to write to."""

    @property
    def environment(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"

    def install(self, torch_index: str, say: Callable[[str], None]) -> None:
        """Unless it is installed; `say` is told what, before it takes its minutes. Raises PeerUnavailable."""
        done, packages = self.environment / ".installed", " ".join([*COMMON_PACKAGES, *self.packages])
        if done.exists() and done.read_text() == packages:
            return
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        torch_package = f"torch=={torch.__version__.partition('+')[0]}"
        index = ["--retries", "0", "--timeout", "10", "--extra-index-url", torch_index]
        say(f"{self.name}: making {self.environment.relative_to(PROJECT)}")
        _checked([sys.executable, "-m", "venv", "--clear", str(self.environment)])
        say(f"{self.name}: installing {torch_package}")
        _checked([*pip, *index, torch_package])
        say(f"{self.name}: installing {packages}")
        _checked([*pip, *packages.split()])
        done.write_text(packages)

    @contextmanager
    def server(self, work: Work, repository: Path, folder: Path) -> Iterator[Server]:
        """For such work, ended with the block. Raises PeerUnavailable."""
        log = folder / f"{self.name}.log"
        try:
            command = self.command(work, self.environment, repository, folder)
        except OSError as error:
            raise PeerUnavailable(f"lacks a file: {error}") from None
        variables = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", **command.variables}
        with on_core(SERVER_CORE), log.open("wb") as output:
            process = subprocess.Popen(command.arguments, env=variables, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_for(process, command.port, log)
            yield Server(f"127.0.0.1:{command.port}", process.pid, self.name, weights_file(repository))
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _checked(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise PeerUnavailable(str(error)) from None
    if done.returncode:
        raise PeerUnavailable(last_line(done.stdout))


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until_s = time.monotonic() + START_UP_S
    while process.poll() is None and time.monotonic() < until_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise PeerUnavailable(f"does not start: {last_line(log.read_text(errors='replace'))}")


def _module(environment: Path, module: str, *arguments: object) -> list[str]:
    return [str(environment / "bin" / "python"), "-m", module, *map(str, arguments)]


def mosec(work: Work, environment: Path, repository: Path, _: Path) -> Command:
    """HTTP; its own batcher."""
    port = free_port()
    arguments = _module(environment, "benchmarks.peers.mosec_server", "--address", "127.0.0.1", "--port", port)
    variables = {"WORK": work, "WEIGHTS": str(weights_file(repository))}
    return Command([*arguments, *(MOSEC_LIMITS if work == "sequences" else ())], port, variables)


def kserve(work: Work, environment: Path, repository: Path, _: Path) -> Command:
    """The SDK's own gRPC server."""
    port, http_port = free_port(), free_port()
    arguments = _module(environment, "benchmarks.peers.kserve_server", work, weights_file(repository), port, http_port)
    return Command(arguments, port, {})


def triton(work: Work, environment: Path, repository: Path, folder: Path) -> Command:
    """Its binary from nvidia-pytriton with the Python backend; batches sessions' steps by the strategy `oldest`."""
    (packages,) = environment.glob("lib/python3*/site-packages")
    binaries = folder / "tritonserver"
    shutil.copytree(packages / "pytriton" / "tritonserver", binaries)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = binaries / "python_backend_stubs" / python / "triton_python_backend_stub"
    shutil.copy(stub, binaries / "backends" / "python")
    model = folder / "models" / MODEL
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(TRITON_CONFIG + TRITON_BATCHING[work])
    shutil.copy(Path(__file__).parent / f"triton_{work}.py", model / "1" / "model.py")
    shutil.copy(weights_file(repository), model / "1")
    grpc_port, http_port = free_port(), free_port()
    arguments = [
        str(binaries / "bin" / "tritonserver"), f"--model-repository={model.parent}",
        f"--backend-directory={binaries / 'backends'}", f"--grpc-port={grpc_port}", f"--http-port={http_port}",
        "--grpc-address=127.0.0.1", "--http-address=127.0.0.1", "--allow-metrics=false",
        "--grpc-infer-allocation-pool-size=1024",  # with its 8 it dies under streaming load
    ]  # fmt: skip
    variables = {
        "PYTHONPATH": f"{PROJECT}:{packages}",
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
    }
    return Command(arguments, grpc_port, variables)


PEERS = (
    Peer(MOSEC, ("mosec==0.9.8",), mosec),
    Peer(TRITON, ("nvidia-pytriton==0.7.0",), triton),
    Peer(KSERVE, ("kserve==0.21.0",), kserve),
)


def installed_peers(names: Container[str], torch_index: str, progress: Progress, failed: dict[str, str]) -> list[Peer]:
    """Those of such names that can be; why others cannot goes into `failed`."""
    wanted = [peer for peer in PEERS if peer.name in names]
    task = progress.add_task("installing", total=len(wanted))
    for peer in wanted:
        progress.update(task, description=f"installing {peer.name}", advance=1)
        try:
            peer.install(torch_index, progress.console.print)
        except PeerUnavailable as reason:
            failed[peer.name] = f"cannot be installed: {reason}"
        progress.console.print(f"{peer.name}: {failed.get(peer.name, 'installed')}")
    return [peer for peer in wanted if peer.name not in failed]


@contextmanager
def started_peers(
    peers: Sequence[Peer], work: Work, repository: Path, folder: Path, failed: dict[str, str]
) -> Iterator[dict[str, Server]]:
    """By name; why others do not start goes into `failed`."""
    with ExitStack() as stack:
        servers = {}
        for peer in peers:
            try:
                servers[peer.name] = stack.enter_context(peer.server(work, repository, folder))
            except PeerUnavailable as reason:
                failed[peer.name] = str(reason)
        yield servers
