from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from tests.support.server import RunningServer
from tests.support.wire import TIMEOUT_S


def test_a_client_without_our_stubs_finds_services_and_methods(server: RunningServer) -> None:
    asked = [
        ServerReflectionRequest(list_services=""),
        ServerReflectionRequest(file_containing_symbol="rnnserve.v1.RealTimeService"),
    ]
    with grpc.insecure_channel(server.target) as channel:
        stub: Any = ServerReflectionStub(channel)
        listed, found = stub.ServerReflectionInfo(iter(asked), timeout=TIMEOUT_S)
    assert {service.name for service in listed.list_services_response.service} == {
        "rnnserve.v1.RealTimeService",
        "rnnserve.v1.SequenceService",
        "rnnserve.v1.ModelService",
        "rnnserve.v1.SessionService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files = [FileDescriptorProto.FromString(file) for file in found.file_descriptor_response.file_descriptor_proto]
    methods = {(service.name, method.name) for file in files for service in file.service for method in service.method}
    assert ("RealTimeService", "StreamSteps") in methods
