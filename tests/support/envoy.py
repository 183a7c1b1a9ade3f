"""A real Envoy with the configuration of deploy/, in front of services on this machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.server import ROOT, free_port

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent))
START_TIMEOUT_S = 20.0


@contextmanager
def envoy(folder: Path, ports: Sequence[int]) -> Iterator[str]:
    """Its target; only the addresses differ from what is deployed."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    port = free_port()
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    (cluster,) = config["static_resources"]["clusters"]
    cluster["type"] = "STATIC"
    cluster["load_assignment"]["endpoints"] = [
        {"lb_endpoints": [{"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": p}}}}]}
        for p in ports
    ]
    del config["admin"]
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [
        str(ENVOY),
        "--config-path",
        str(file),
        "--use-dynamic-base-id",
        "--log-level",
        "error",
        "--concurrency",
        "1",
    ]
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        _wait_for(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError("envoy did not start") from None
            time.sleep(0.05)
