"""Free blocks and inodes: the bitmaps of all groups, each read when it is first needed."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

Run = tuple[int, int]


class Allocator:
    """Hands out numbers from 0 to ``total``, in ascending order from the highest in use, then from the start.

    So the additions of one layer lie together, wherever the layers before left holes. ``load(group)`` returns a
    group's bitmap; ``free`` counts the free numbers of each group, and :meth:`changed` updates it.
    """

    def __init__(self, total: int, per_group: int, free: list[int], load: Callable[[int], bytes], name: str) -> None:
        self.free = free
        self._name = name
        self._total = total
        self._per_group = per_group
        self._load = load
        self._bits: dict[int, NDArray[np.uint8]] = {}
        self._changed: set[int] = set()
        self._left = sum(free)
        # The free run at the cursor, and the numbers taken before it that are not yet in the bitmaps. Most calls take
        # a small piece next to the last one.
        self._at = self._end = 0
        self._taken_from = 0
        self._next = self._first_after_used()

    def take(self, count: int) -> list[Run]:
        """Return ``count`` numbers as runs (first, length). Raises OSError (ENOSPC) if too few are free."""
        if count > self._left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._left -= count
        at = self._at
        if 0 < count <= self._end - at:
            self._at = at + count
            return [(at, count)]
        found: list[Run] = []
        while count:
            if self._at == self._end:
                self._mark_taken()
                self._at, self._end = self._next_run()
                self._taken_from = self._at
            first, length = self._at, min(count, self._end - self._at)
            self._at += length
            if found and sum(found[-1]) == first:
                found[-1] = (found[-1][0], found[-1][1] + length)
            else:
                found.append((first, length))
            count -= length
        return found

    def take_one(self) -> int:
        """Return one number. Raises OSError (ENOSPC) if all are taken."""
        return self.take(1)[0][0]

    def give_back(self, first: int, length: int) -> None:
        """Free numbers. Raises FormatError if one of them is already free."""
        self._mark_taken()
        self._mark(first, length, 0)
        self._left += length

    def changed(self) -> Iterator[tuple[int, bytes]]:
        """Yield each changed group with its bitmap, in which bits beyond the group's numbers are set."""
        self._mark_taken()
        for group in sorted(self._changed):
            yield group, np.packbits(self._bits[group], bitorder="little").tobytes()

    @property
    def left(self) -> int:
        """Free numbers in all groups."""
        return self._left

    def _size(self, group: int) -> int:
        return min(self._per_group, self._total - group * self._per_group)

    def _group(self, group: int) -> NDArray[np.uint8]:
        bits = self._bits.get(group)
        if bits is None:
            bits = np.unpackbits(np.frombuffer(self._load(group), np.uint8), bitorder="little")
            if int(np.count_nonzero(bits[: self._size(group)] == 0)) != self.free[group]:
                raise FormatError("free count of a group is wrong", blob=self._name, got=self.free[group])
            self._bits[group] = bits
        return bits

    def _mark_taken(self) -> None:
        self._mark(self._taken_from, self._at - self._taken_from, 1)
        self._taken_from = self._at

    def _mark(self, first: int, length: int, value: int) -> None:
        while length:
            group, index = divmod(first, self._per_group)
            count = min(length, self._per_group - index)
            bits = self._group(group)[index : index + count]
            if value == 0 and not bits.all():
                raise FormatError("something is used twice, or was free", blob=self._name, got=(first, length))
            bits[:] = value
            self.free[group] += -count if value else count
            self._changed.add(group)
            first += count
            length -= count

    def _first_after_used(self) -> int:
        for group in range(len(self.free) - 1, -1, -1):
            size = self._size(group)
            if self.free[group] < size:
                used = np.flatnonzero(self._group(group)[:size])
                return group * self._per_group + int(used[-1]) + 1
        return 0

    def _next_run(self) -> Run:
        # A free run exists: `take` has checked the counts.
        while True:
            if self._next >= self._total:
                self._next = 0
            group, index = divmod(self._next, self._per_group)
            size = self._size(group)
            base = group * self._per_group
            if self.free[group]:
                bits = self._group(group)[index:size]
                free = int(bits.argmin())
                if bits[free] == 0:
                    used = int(bits[free:].argmax())
                    end = free + used if bits[free + used] else size - index
                    self._next = base + index + end
                    return base + index + free, base + index + end
            self._next = base + size
