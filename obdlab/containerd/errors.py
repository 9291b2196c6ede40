"""containerd's failures as exceptions: one mapping from gRPC status codes."""

from __future__ import annotations

import grpc

from obdlab.errors import ObdlabError


class ContainerdError(ObdlabError):
    """containerd refused or failed a call."""


class NotFoundError(ContainerdError):
    """The blob, image, lease or snapshot does not exist."""


class AlreadyExistsError(ContainerdError):
    """The object exists already. From Prepare it also means that the snapshotter needs no download."""


class InvalidArgumentError(ContainerdError):
    """containerd does not accept the request."""


class FailedPreconditionError(ContainerdError):
    """The current state forbids the request: a digest that does not match, a snapshot that still has children."""


class UnavailableError(ContainerdError):
    """containerd cannot be reached, or another client has locked the object; a later try may work."""


class DeadlineError(ContainerdError):
    """containerd did not answer in time."""


class UnsupportedError(ContainerdError):
    """containerd, or the snapshotter behind it, does not support the call."""


_KINDS: dict[grpc.StatusCode, type[ContainerdError]] = {
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
}


def from_rpc(error: grpc.RpcError, doing: str) -> ContainerdError:
    """Return the exception for a failed call; ``doing`` describes the call."""
    if not isinstance(error, grpc.Call):
        return ContainerdError(f"{doing}: {error}")
    code = error.code()
    return _KINDS.get(code, ContainerdError)(f"{doing}: {error.details()} ({code.name})")
