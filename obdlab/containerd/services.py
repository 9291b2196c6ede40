"""Stubs and handlers of gRPC services, made of protobuf's descriptors.

A descriptor has the names of the methods, their messages, and the side that streams. So no code is generated for
services; the generator's ``.pyi`` files are kept, as the types of the stubs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message_factory import GetMessageClass

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor

# By (the client streams, the server streams).
_CALLS = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


def make_stub(channel: grpc.Channel, file: FileDescriptor, name: str) -> Any:
    """Return an object with a callable for each method of the service ``name``, which ``file`` defines."""
    service = file.services_by_name[name]
    return SimpleNamespace(
        **{
            method.name: getattr(channel, _CALLS[method.client_streaming, method.server_streaming])(
                f"/{service.full_name}/{method.name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            for method in service.methods
        }
    )


def serve(server: grpc.Server, service: ServiceDescriptor, servicer: object) -> None:
    """Let ``servicer`` answer the service's calls. Raises AttributeError if it lacks one of the methods."""
    handlers = {
        method.name: getattr(grpc, f"{_CALLS[method.client_streaming, method.server_streaming]}_rpc_method_handler")(
            getattr(servicer, method.name),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in service.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
