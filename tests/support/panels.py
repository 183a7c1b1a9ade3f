"""The queries of the dashboard, and a load under which each has something to show."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import grpc

from rnnserve import Client
from tests.support.server import ROOT, RunningServer, start_server
from tests.support.wire import live_stream, open_, resume, steps

DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "rnnserve.json"
RULES = ROOT / "deploy" / "prometheus" / "rules" / "rnnserve.yml"
RATE_INTERVAL_S = 15


class Query(NamedTuple):
    """One line of a panel."""

    row: str
    panel: str
    expression: str


def queries() -> list[Query]:
    """All, as Grafana would send them for all models."""
    found, row = [], ""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", f"{RATE_INTERVAL_S}s").replace("$model", ".*")
            found.append(Query(row, panel["title"], expression))
    return found


@contextmanager
def loaded_server() -> Iterator[RunningServer]:
    """Of the trained bundles, under a load of all kinds; parked sessions are evicted soon."""
    over = threading.Event()
    with start_server(resume_window_s=2.0, checkpoint_interval_s=0.2) as server:
        threads = [threading.Thread(target=_again_and_again, args=(work, server.target, over)) for work in WORK]
        for thread in threads:
            thread.start()
        try:
            yield server
        finally:
            over.set()
            for thread in threads:
                thread.join()


def _again_and_again(work: Callable[[Client, str], None], target: str, over: threading.Event) -> None:
    with Client(target) as client:
        while not over.wait(0.05):
            work(client, target)


def _streams(client: Client, target: str) -> None:
    """Steps, a refusal, a session that is left, resumed, and left for good."""
    frames = client.samples("speaker")[0].input
    opening = open_("speaker", uuid.uuid4().hex, token=b"0123456789abcdef")
    with grpc.insecure_channel(target) as channel:
        with live_stream(channel, opening) as stream:
            for frame in frames:
                stream.step([frame])
            stream.ask(steps(stream.next_step, [[1.0, 2.0]]))
        with live_stream(channel, resume(opening)) as stream:
            stream.read()


def _multiplexed(client: Client, _target: str) -> None:
    recording = client.samples("activity")[0].input
    with client.multiplex("activity") as gateway:
        for x in recording[:20]:
            gateway.step(["a", "b", "c"], [x] * 3)


def _sequences(client: Client, _target: str) -> None:
    """Of several lengths, so that there is padding."""
    recording = client.samples("speaker-bidirectional")[0].input
    client.predict("speaker-bidirectional", [recording, recording[:5], recording[:9]])


def _outputs(client: Client, _target: str) -> None:
    for _ in client.generate("chorale-vanilla", max_symbols=12, seed=1):
        pass


WORK = (_streams, _multiplexed, _sequences, _outputs)
