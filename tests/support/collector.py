"""A collector of OpenTelemetry: a real receiver of OTLP over gRPC, which keeps what it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class Collector:
    """All spans so far."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def export(self, request: ExportTraceServiceRequest, _context: object) -> ExportTraceServiceResponse:
        self.spans += [
            span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]
        return ExportTraceServiceResponse()

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def children_of(self, span: Any) -> list[Any]:
        return [other for other in self.spans if other.parent_span_id == span.span_id]


@contextmanager
def start_collector(**variables: str) -> Iterator[Collector]:
    """On a free port; servers that are started in the block send their spans there, and have these variables."""
    receiver, collector = grpc.server(ThreadPoolExecutor(2)), Collector()
    export = grpc.unary_unary_rpc_method_handler(
        collector.export,
        request_deserializer=ExportTraceServiceRequest.FromString,
        response_serializer=ExportTraceServiceResponse.SerializeToString,
    )
    receiver.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": export}),))
    target = f"http://127.0.0.1:{receiver.add_insecure_port('127.0.0.1:0')}"
    receiver.start()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": target, **variables}.items():
            environment.setenv(name, value)
        yield collector
    receiver.stop(None)
