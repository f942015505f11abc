"""Stubs of a gRPC server, made of what its reflection says: no generated code, no .proto files."""

from types import SimpleNamespace

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

REFLECTION_VERSIONS = ("v1", "v1alpha")


class Reflected:
    """What a server says about itself, as classes and callables."""

    def __init__(self, channel, database=None):
        """`database` stands in for a server's reflection."""
        self.channel = channel
        database = database or ProtoReflectionDescriptorDatabase(channel)
        self.pool = descriptor_pool.DescriptorPool(database)

    def message(self, name):
        """The class of a message."""
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))

    def enum(self, name):
        """Numbers of an enum by name."""
        return self.pool.FindEnumTypeByName(name).values_by_name

    def service(self, name, channel=None):
        """The methods of a service, each callable as grpcio's stubs are."""
        channel = channel or self.channel
        methods = {}
        for method in self.pool.FindServiceByName(name).methods:
            kind = channel.unary_stream if method.server_streaming else channel.unary_unary
            answer = message_factory.GetMessageClass(method.output_type)
            question = message_factory.GetMessageClass(method.input_type)
            methods[method.name] = kind(
                f"/{name}/{method.name}",
                request_serializer=question.SerializeToString,
                response_deserializer=answer.FromString,
            )
        return SimpleNamespace(**methods)


def list_services(channel, version):
    """Names of all services by one version of the reflection protocol. Both versions have the same
    messages; they differ in the name of the service only."""
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = list(ask(iter([question]), timeout=10))
    return sorted(service.name for service in answers[0].list_services_response.service)


def open_channel(server):
    """A connection of its own to `host:port`: grpcio shares connections between equal channels."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.enable_http_proxy", 0),
    ]
    return grpc.insecure_channel(server, options=options)
