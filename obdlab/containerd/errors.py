"""What containerd answers when it does not do as asked, as exceptions: one mapping from gRPC status codes."""

from __future__ import annotations

import grpc

from obdlab.errors import ObdlabError


class ContainerdError(ObdlabError):
    """containerd refused or failed a call."""


class NotFoundError(ContainerdError):
    """The blob, image, lease or snapshot does not exist."""


class AlreadyExistsError(ContainerdError):
    """It exists already. From Prepare this is also how a snapshotter says that no download is needed."""


class InvalidArgumentError(ContainerdError):
    """The request makes no sense to containerd."""


class FailedPreconditionError(ContainerdError):
    """The state of things forbids it: a digest that does not match, a snapshot that still has children."""


class UnavailableError(ContainerdError):
    """containerd cannot be reached, or what was asked for is locked by another client; later may work."""


class DeadlineError(ContainerdError):
    """containerd did not answer in time."""


class UnsupportedError(ContainerdError):
    """containerd, or the snapshotter behind it, has no such call."""


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
    """Return the exception for a failed call; ``doing`` says what the call was for."""
    if not isinstance(error, grpc.Call):
        return ContainerdError(f"{doing}: {error}")
    code = error.code()
    return _KINDS.get(code, ContainerdError)(f"{doing}: {error.details()} ({code.name})")
