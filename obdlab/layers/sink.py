"""Where written layers go: a binary file, or anything with its ``write``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    from obdlab.blob import Buffer


class Sink(Protocol):
    """Something that takes bytes in order. ``write`` must take all it is given, or raise."""

    def write(self, data: Buffer, /) -> object:
        """Append ``data`` at the current position."""


@runtime_checkable
class SeekableSink(Sink, Protocol):
    """A sink that may be able to go back."""

    def seekable(self) -> bool:
        """Whether it really is."""

    def tell(self) -> int:
        """Return the current position."""

    def seek(self, offset: int, /) -> object:
        """Move to ``offset``."""


def can_seek(sink: Sink) -> TypeGuard[SeekableSink]:
    """Whether ``sink`` can go back, as a pipe or an upload cannot."""
    return isinstance(sink, SeekableSink) and sink.seekable()
