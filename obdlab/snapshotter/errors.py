"""Errors of a snapshot operation: the kinds that containerd's contract knows."""

from __future__ import annotations

from obdlab.errors import ObdlabError


class NotFoundError(ObdlabError):
    """The snapshot or its parent does not exist."""


class AlreadyExistsError(ObdlabError):
    """The key or name is taken. In a pull this answer spares the client a download."""


class InvalidArgumentError(ObdlabError):
    """The request is malformed: an empty key, an uncommitted parent, a broken filter."""


class FailedPreconditionError(ObdlabError):
    """The snapshot is in the wrong state: it has children, is not active, or is still in use."""


class UnsupportedError(ObdlabError):
    """This service does not do it; a caller with another one asks that. containerd does so with its differs."""


class HasChildrenError(FailedPreconditionError):
    """A snapshot to be removed has children. The text begins as containerd's own: callers look for it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"cannot remove snapshot with child: snapshot {key!r}")
