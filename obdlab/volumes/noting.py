"""A disk that notes the ranges read of it, as the kernel would read them: in whole pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.blob import Wrapper

if TYPE_CHECKING:
    from collections.abc import Callable

    from obdlab.blob import Blob
    from obdlab.call import Call

PAGE = 4096


class NotedDisk(Wrapper):
    """Calls ``note(begin, end)``, multiples of :data:`PAGE`, before each read; an error that it raises is the read's.

    There are no streams, so that every byte is noted.
    """

    def __init__(self, disk: Blob, note: Callable[[int, int], object]) -> None:
        super().__init__(disk)
        self._note = note

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        """Note the range and return its bytes."""
        self._note(offset // PAGE * PAGE, -(-(offset + length) // PAGE) * PAGE)
        return self.below.read_at(offset, length, call)

    def stream(self, offset: int, length: int, call: Call | None = None) -> None:
        """Return None: every byte goes through :meth:`read_at`."""
