"""Outputs of written layers: a binary file, or any object with its ``write``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    from obdlab.blob import Buffer


class Sink(Protocol):
    """A writer of bytes in order. ``write`` must take all bytes given, or raise."""

    def write(self, data: Buffer, /) -> object:
        """Append ``data`` at the current position."""


@runtime_checkable
class SeekableSink(Sink, Protocol):
    """A sink that may support seeking; ask :meth:`seekable`."""

    def seekable(self) -> bool:
        """Return True if seeking works."""

    def tell(self) -> int:
        """Return the current position."""

    def seek(self, offset: int, /) -> object:
        """Move to ``offset``."""


def can_seek(sink: Sink) -> TypeGuard[SeekableSink]:
    """Return True if ``sink`` can seek back, unlike a pipe or an upload."""
    return isinstance(sink, SeekableSink) and sink.seekable()
