"""The generated stubs of one channel, together."""

from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from rnnserve.v1.model_service_pb2_grpc import ModelServiceStub
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceStub
from rnnserve.v1.session_service_pb2_grpc import SessionServiceStub

__all__ = ["HealthCheckRequest", "Stubs", "health_status_name"]


class Stubs:
    """All services on one channel. On a channel of grpc.aio the same methods are awaitable."""

    def __init__(self, channel: Any) -> None:
        self.models: ModelServiceStub = ModelServiceStub(channel)
        self.sequences: SequenceServiceStub = SequenceServiceStub(channel)
        self.real_time: RealTimeServiceStub = RealTimeServiceStub(channel)
        self.sessions: SessionServiceStub = SessionServiceStub(channel)
        self.health_check: grpc.UnaryUnaryMultiCallable[HealthCheckRequest, HealthCheckResponse]
        self.health_check = HealthStub(channel).Check  # type: ignore[attr-defined]


def health_status_name(response: HealthCheckResponse) -> str:
    """Such as "serving" or "not_serving"."""
    return HealthCheckResponse.ServingStatus.Name(response.status).lower()
