"""What a snapshot operation can answer besides a result: the kinds containerd's contract knows."""

from __future__ import annotations

from obdlab.errors import ObdlabError


class NotFoundError(ObdlabError):
    """No snapshot of that key, or of that parent."""


class AlreadyExistsError(ObdlabError):
    """The key or name is taken. On a pull this is the answer that spares the client a download."""


class InvalidArgumentError(ObdlabError):
    """The request itself makes no sense: an empty key, an uncommitted parent, a broken filter."""


class FailedPreconditionError(ObdlabError):
    """The snapshot is in no state for this: it has children, is not active, or is still in use."""


class HasChildrenError(FailedPreconditionError):
    """A snapshot with children was to be removed. The text begins as containerd's own, which callers look for."""

    def __init__(self, key: str) -> None:
        super().__init__(f"cannot remove snapshot with child: snapshot {key!r}")
