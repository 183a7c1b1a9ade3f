"""Spans for OpenTelemetry: of each stream, of sampled steps and of sampled other calls. Off by default.

What is not sampled costs a comparison. Steps become spans when they are over, from the times that were taken anyway.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from models.manifest import ModelKey
from service.addresses import StartError

Method = tuple[str, str, str]

CallSpan: TypeAlias = Span
NO_SPAN = NonRecordingSpan(trace.INVALID_SPAN_CONTEXT)
PROPAGATOR = TraceContextTextMapPropagator()


class Timing(NamedTuple):
    """Of a message of steps, by time.perf_counter: when it came and was answered; and of its ticks in all."""

    start_s: float
    waited_s: float
    computed_s: float
    sent_s: float


class Tracing:
    """Begins spans. Whether the client samples decides for its calls, `ratio` for all others and for steps."""

    def __init__(self, tracer: Tracer | None = None, ratio: float = 0.0, draw: Callable[[], float] = random.random):
        """Without a tracer there are none."""
        self._tracer = tracer
        self._ratio = ratio
        self._draw = draw

    @contextmanager
    def call(self, method: Method, metadata: Mapping[str, str | bytes]) -> Iterator[CallSpan]:
        """Of a call, current within; a stream has one in any case."""
        kind, service, name = method
        parent = PROPAGATOR.extract({key: value for key, value in metadata.items() if isinstance(value, str)})
        if self._tracer is None or not self._wanted(parent, is_stream=kind != "unary"):
            yield NO_SPAN
            return
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        with self._tracer.start_as_current_span(
            f"{service}/{name}",
            parent,
            SpanKind.SERVER,
            attributes,
            record_exception=False,
            set_status_on_exception=False,  # gRPC's own exception says nothing; `refused` does
        ) as span:
            yield span

    def _wanted(self, parent: Context, *, is_stream: bool) -> bool:
        context = trace.get_current_span(parent).get_span_context()
        if context.is_valid:
            return context.trace_flags.sampled
        return is_stream or self._draw() < self._ratio

    def opened(self, session_id: str, model: ModelKey) -> None:
        """The call has a session."""
        if self._tracer is not None:
            trace.get_current_span().set_attributes({"rnnserve.session": session_id, **_about(model)})

    def refused(self, reason: str) -> None:
        """The call ends with an error."""
        if self._tracer is not None:
            trace.get_current_span().set_status(Status(StatusCode.ERROR, reason))

    def samples_steps(self) -> bool:
        """Whether the steps that were just answered shall have a span."""
        return self._tracer is not None and self._draw() < self._ratio

    def steps(self, model: ModelKey, timing: Timing, **attributes: int) -> None:
        """A message of steps was answered, within a call."""
        if self._tracer is None or not trace.get_current_span().is_recording():
            return
        now_ns = time.time_ns() - time.perf_counter_ns()

        def ns(at_s: float) -> int:
            return now_ns + int(at_s * 1e9)

        start_s, waited_s, computed_s, sent_s = timing
        begun_s = start_s + waited_s
        told = {f"rnnserve.{name}": value for name, value in attributes.items()}
        span = self._tracer.start_span("steps", attributes={**_about(model), **told}, start_time=ns(start_s))
        within = trace.set_span_in_context(span)
        parts = ("queue", start_s, begun_s), ("compute", begun_s, begun_s + computed_s)
        for name, from_s, to_s in parts:
            self._tracer.start_span(name, within, start_time=ns(from_s)).end(ns(to_s))
        span.end(ns(sent_s))


def _about(model: ModelKey) -> dict[str, str | int]:
    return {"rnnserve.model": model.name, "rnnserve.version": model.version}


OFF = Tracing()


class Exporter(NamedTuple):
    """What begins spans, and how what is left of them is sent: to be called, from a thread, before the end."""

    tracing: Tracing
    flush: Callable[[], object]


def exporter(ratio: float, version: str) -> Exporter:
    """To where OTEL_EXPORTER_OTLP_ENDPOINT says. Raises StartError without the extra `tracing`."""
    if not ratio:
        return Exporter(OFF, lambda: None)
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise StartError("trace_sample_ratio: this needs the extra `tracing`, OpenTelemetry's SDK") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "rnnserve", "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Exporter(Tracing(provider.get_tracer("rnnserve", version), ratio), provider.force_flush)
