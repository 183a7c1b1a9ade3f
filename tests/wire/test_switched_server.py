"""The server that the cost of metrics and spans is measured with."""

import json
from pathlib import Path

import grpc
import pytest

from benchmarks.switched import FILE_VARIABLE, KINDS, METRICS, NOTHING, SPANS
from tests.support.collector import start_collector
from tests.support.server import start_server
from tests.support.wire import close, live_stream, metric, open_


def test_a_server_that_counts_by_turns_serves_all_the_same_and_tells_what_it_did_in_each(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns_file, stepped = tmp_path / "turns.jsonl", 0
    monkeypatch.setenv(FILE_VARIABLE, str(turns_file))
    with (
        start_collector() as collector,
        start_server(repository, module="benchmarks.switched", trace_sample_ratio=1, session_store="memory") as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        rounds_before = len(turns_file.read_text().splitlines()) if turns_file.exists() else 0
        with live_stream(channel, open_("vanilla", "switched", version=1)) as stream:
            while not turns_file.exists() or len(turns_file.read_text().splitlines()) < rounds_before + 2:
                stream.step([[1.0, 2.0, 3.0]])
                stepped += 1
            stream.ask(close())
        counted = metric(server.metrics_url, "rnnserve_steps_total", model="vanilla", version="1")
    rounds = [json.loads(line) for line in turns_file.read_text().splitlines()]
    steps = {kind: sum(told[kind][0] for told in rounds) for kind in KINDS}
    assert min(steps.values()) > 0
    assert steps[METRICS] + steps[SPANS] <= counted < stepped, "but for a turn that has not ended"
    assert 0 < len(collector.named("steps")) < stepped - steps[NOTHING]
