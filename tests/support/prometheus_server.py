"""A real Prometheus, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.server import free_port

START_TIMEOUT_S = 30.0
SCRAPE_EVERY_S = 1
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus")


class Prometheus:
    """Its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def query(self, expression: str) -> list[Any]:
        """An instant vector, now. Raises ValueError with what Prometheus says of a query that is wrong."""
        result: list[Any] = self._get("query", query=expression)["result"]
        return result

    def rules(self) -> list[Any]:
        """Each with its health, and of alerts the state."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, what: str, **given: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(given)}") as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error)["error"]) from None


@contextmanager
def start_prometheus(folder: Path, target: str, rule_files: Sequence[Path]) -> Iterator[Prometheus]:
    """Scrapes HOST:PORT each second as the job `rnnserve`, and evaluates the rules as often."""
    config = folder / "prometheus.yml"
    every = f"{SCRAPE_EVERY_S}s"
    described = {
        "global": {"scrape_interval": every, "evaluation_interval": every},
        "rule_files": [str(file) for file in rule_files],
        "scrape_configs": [{"job_name": "rnnserve", "static_configs": [{"targets": [target]}]}],
    }
    config.write_text(yaml.safe_dump(described))
    port = free_port()
    flags = {"config.file": config, "storage.tsdb.path": folder / "data", "web.listen-address": f"127.0.0.1:{port}"}
    command = ["prometheus", *(f"--{name}={value}" for name, value in flags.items())]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        running, deadline_s = Prometheus(port), time.monotonic() + START_TIMEOUT_S
        while not running.answers():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"prometheus did not start:\n{(folder / 'prometheus.log').read_text()}")
            time.sleep(0.05)
        yield running
    finally:
        process.kill()
        process.wait()
