"""The server that the cost of metrics is measured against."""

from pathlib import Path

import grpc

from tests.support.server import start_server
from tests.support.wire import close, live_stream, open_, sample_values


def test_a_server_that_counts_nothing_serves_all_the_same(repository: Path) -> None:
    with (
        start_server(repository, module="benchmarks.unobserved") as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        with live_stream(channel, open_("vanilla", "unseen")) as stream:
            stream.step([[1.0, 2.0, 3.0]])
            stream.ask(close())
        counted = {
            name: value
            for (name, _), value in sample_values(server.metrics_url).items()
            if name.startswith(("rnnserve_steps", "rnnserve_sessions_opened", "grpc_server"))
        }
    assert not any(counted.values())
