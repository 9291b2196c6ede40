"""One gRPC channel to containerd, with the metadata and deadline of every call."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import grpc

from obdlab.containerd.errors import from_rpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")

# containerd's own limit for messages it receives; its answer to a listing may come near it.
MAX_MESSAGE = 16 << 20


@dataclass(frozen=True, slots=True)
class Connection:
    """A channel with the values sent along with every call: namespace, lease, deadline in seconds."""

    channel: grpc.Channel
    address: str
    namespace: str
    metadata: tuple[tuple[str, str], ...]
    timeout_s: float

    @classmethod
    def open(cls, address: str, namespace: str, timeout_s: float) -> Self:
        """Return a connection to the unix socket at ``address``. The first call opens it."""
        channel = grpc.insecure_channel(
            f"unix:{address}",
            options=[
                # The default authority of a unix target is its path, which Go's HTTP/2 server refuses.
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", MAX_MESSAGE),
            ],
        )
        return cls(channel, address, namespace, (("containerd-namespace", namespace),), timeout_s)

    def leased(self, lease_id: str) -> Self:
        """Return the same channel with a lease that holds everything made through it."""
        return replace(self, metadata=(*self.metadata, ("containerd-lease", lease_id)))

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        doing: str,
        *,
        timeout_s: float | None = None,
    ) -> ResponseT:
        """Call ``method`` and return its answer. Raises a ContainerdError that begins with ``doing``."""
        with self.errors(doing):
            return method(request, timeout=timeout_s or self.timeout_s, metadata=self.metadata)

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn gRPC's errors into ContainerdError."""
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc(error, f"containerd at {self.address}: {doing}") from error
