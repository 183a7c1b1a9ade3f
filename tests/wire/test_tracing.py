"""Spans of the real server, as a collector of OpenTelemetry receives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from rnnserve import Client, RnnserveError
from tests.support.collector import Collector, start_collector
from tests.support.server import RunningServer, start_server
from tests.support.wire import eventually, random_steps

STREAM, PREDICT = "rnnserve.v1.RealTimeService/StreamSteps", "rnnserve.v1.SequenceService/Predict"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with start_collector(OTEL_BSP_SCHEDULE_DELAY="100") as running:
        yield running


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def step(server: RunningServer, count: int = 3) -> None:
    with Client(server.target) as client, client.stream("vanilla", session="traced") as stream:
        for x in random_steps(count):
            stream.step(x)


def test_a_stream_has_a_span_and_each_sampled_step_one_with_its_parts(repository: Path, collector: Collector) -> None:
    with start_server(repository, trace_sample_ratio=1) as server:
        step(server)
    (stream,) = collector.named(STREAM)
    assert attributes(stream)["rnnserve.session"] == "traced"
    steps = collector.named("steps")
    assert [attributes(each)["rnnserve.steps"] for each in steps] == [1, 1, 1]
    for each in steps:
        assert each.parent_span_id == stream.span_id
        parts = collector.children_of(each)
        assert sorted(part.name for part in parts) == ["compute", "queue"]
        assert all(part.start_time_unix_nano <= part.end_time_unix_nano for part in parts)
        assert each.start_time_unix_nano <= min(part.start_time_unix_nano for part in parts)
        assert max(part.end_time_unix_nano for part in parts) <= each.end_time_unix_nano
        assert stream.start_time_unix_nano <= each.start_time_unix_nano <= stream.end_time_unix_nano


def test_steps_of_a_multiplexed_stream_have_spans_too(repository: Path, collector: Collector) -> None:
    with (
        start_server(repository, trace_sample_ratio=1) as server,
        Client(server.target) as client,
        client.multiplex("vanilla") as gateway,
    ):
        gateway.step(["a", "b"], random_steps(2))
    (stream,) = collector.named("rnnserve.v1.RealTimeService/MultiplexSteps")
    steps = collector.named("steps")
    assert sum(attributes(each)["rnnserve.sessions"] for each in steps) == 2
    assert {each.parent_span_id for each in steps} == {stream.span_id}


def test_a_call_of_a_traced_client_is_part_of_its_trace(repository: Path, collector: Collector) -> None:
    tracer = TracerProvider().get_tracer("caller")
    with start_server(repository, trace_sample_ratio=0.000001) as server, Client(server.target) as client:
        with tracer.start_as_current_span("mine") as mine:
            client.predict("vanilla", [random_steps(2)])
        client.predict("vanilla", [random_steps(2)])  # of its own accord, so it is hardly ever sampled
        eventually(lambda: bool(collector.named(PREDICT)))
    (call,) = collector.named(PREDICT)
    assert call.trace_id == mine.get_span_context().trace_id.to_bytes(16, "big")
    assert call.parent_span_id == mine.get_span_context().span_id.to_bytes(8, "big")


def test_a_client_that_does_not_sample_is_heeded(repository: Path, collector: Collector) -> None:
    context = trace.SpanContext(trace_id=7, span_id=7, is_remote=False, trace_flags=trace.TraceFlags(0))
    with start_server(repository, trace_sample_ratio=1) as server:
        with trace.use_span(trace.NonRecordingSpan(context)):
            step(server)
        with Client(server.target) as client:
            client.predict("vanilla", [random_steps(2)])
    assert collector.named(PREDICT)
    assert not collector.named(STREAM)
    assert not collector.named("steps")


def test_a_span_of_a_call_that_is_refused_says_why(repository: Path, collector: Collector) -> None:
    with start_server(repository, trace_sample_ratio=1) as server, Client(server.target) as client:
        with pytest.raises(RnnserveError):
            client.predict("nobody", [random_steps(2)])
        client.predict("vanilla", [random_steps(2)])
    refused, fine = collector.named(PREDICT)
    assert (refused.status.message, refused.status.code) == ("MODEL_NOT_FOUND", refused.status.STATUS_CODE_ERROR)
    assert fine.status.code == fine.status.STATUS_CODE_UNSET


def test_without_the_setting_nothing_is_sent(repository: Path, collector: Collector) -> None:
    with start_server(repository) as server:
        step(server)
    assert not collector.spans


def test_a_collector_that_is_gone_does_not_hold_up_the_end(repository: Path, collector: Collector) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
        with start_server(repository, trace_sample_ratio=1, drain_timeout_s=1) as server:
            step(server)
            assert server.stop() == 0
