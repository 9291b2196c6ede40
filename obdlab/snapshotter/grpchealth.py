"""The health service of gRPC, ``grpc.health.v1.Health``, for probes.

Its two messages have the wire form of protobuf's well-known StringValue and UInt32Value (one field, number 1), so
these types are used.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import grpc
from google.protobuf.wrappers_pb2 import StringValue, UInt32Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERVICE = "grpc.health.v1.Health"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
#: Each Watch call holds a worker.
_MAX_WATCHERS = 8
_LOOK_S = 1.0


class Health:
    """Answers Check and Watch. Each answer calls ``is_well``; after :meth:`stop` it is NOT_SERVING."""

    def __init__(self, services: frozenset[str], is_well: Callable[[], bool]) -> None:
        self._services = services | {""}
        self._is_well = is_well
        self._stopped = threading.Event()
        self._watchers = threading.Semaphore(_MAX_WATCHERS)

    def stop(self) -> None:
        """Report NOT_SERVING from now on, and end Watch calls."""
        self._stopped.set()

    def add_to(self, server: grpc.Server) -> None:
        """Register with a server."""
        serialize = UInt32Value.SerializeToString
        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, StringValue.FromString, serialize),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, StringValue.FromString, serialize),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def _status(self) -> int:
        return SERVING if not self._stopped.is_set() and self._is_well() else NOT_SERVING

    def _check(self, request: StringValue, context: grpc.ServicerContext) -> UInt32Value:
        if request.value not in self._services:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no such service: {request.value!r}")
        return UInt32Value(value=self._status())

    def _watch(self, request: StringValue, context: grpc.ServicerContext) -> Iterator[UInt32Value]:
        if not self._watchers.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {_MAX_WATCHERS} watch already")
        try:
            known = -1
            while context.is_active():
                status = self._status() if request.value in self._services else SERVICE_UNKNOWN
                if status != known:
                    known = status
                    yield UInt32Value(value=status)
                if self._stopped.wait(_LOOK_S):
                    if known != NOT_SERVING and known != SERVICE_UNKNOWN:
                        yield UInt32Value(value=NOT_SERVING)
                    return
        finally:
            self._watchers.release()
