"""Reading a bbolt file, in which the original snapshotter and containerd's own keep their metadata.

Such a file is a tree of pages. A bucket is a map from keys to values or further buckets; its root is a page, or lies
inline in the value. Two meta pages take turns; the valid one with the higher transaction number counts.

::

    page          u64 id, u16 flags (1 branch, 2 leaf, 4 meta), u16 count, u32 overflow, then its elements
    meta          u32 magic, u32 version, u32 page size, u32 flags, bucket root, u64 freelist, u64 pages, u64 txid,
                  u64 FNV-1a of all before it
    bucket        u64 page of its root (0: a page follows inline), u64 sequence
    leaf element  u32 flags (1 bucket), u32 position, u32 key size, u32 value size
    branch        u32 position, u32 key size, u64 page

(bbolt file format, version 2; all numbers in the byte order of the machine that wrote it, here little endian.)
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

from obdlab.closing import Closing
from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MAGIC, _VERSION = 0xED0CDAED, 2
_PAGE = struct.Struct("<QHHI")
_META = struct.Struct("<IIIIQQQQQQ")
_LEAF = struct.Struct("<IIII")
_BRANCH = struct.Struct("<IIQ")
_BUCKET = struct.Struct("<QQ")
_IS_BRANCH, _IS_LEAF, _IS_META = 1, 2, 4
_IS_BUCKET = 1
_PAGE_SIZES = (4096, 8192, 16384, 32768, 65536, 1024, 2048)
_MAX_DEPTH = 32


class BoltFile(Closing):
    """An open bolt file. It must not be written to meanwhile (bbolt's own lock is a flock of the file).

    Raises FormatError, here and when a bucket is read, if the file is not a bolt file or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError("empty, no bolt file", blob=self.name)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.page_size, root, sequence, self.pages, self.transaction = self._newest_meta()
        except BaseException:
            self._data.close()
            raise
        self.root = Bucket(self, root, sequence, None)

    def close(self) -> None:
        """Let go of the file."""
        self._data.close()

    @property
    def most_pages(self) -> int:
        """An upper bound of the number of pages: the count in the meta page is only a claim."""
        return min(self.pages, len(self._data) // self.page_size)

    def page(self, number: int) -> memoryview:
        """Return a page and its overflow pages."""
        start = number * self.page_size
        if not 2 <= number < self.pages or start + _PAGE.size > len(self._data):
            raise FormatError("page outside the file", blob=self.name, got=number, wanted=f"2 to {self.pages - 1}")
        own, _, _, overflow = _PAGE.unpack_from(self._data, start)
        end = start + (overflow + 1) * self.page_size
        if own != number or end > len(self._data):
            raise FormatError("damaged page", blob=self.name, offset=start, got=(own, overflow), wanted=number)
        return memoryview(self._data[start:end])

    def _newest_meta(self) -> tuple[int, int, int, int, int]:
        found: dict[int, tuple[int, int, int, int, int]] = {}
        first = self._meta(0)
        for at in (0, *((first[0],) if first else _PAGE_SIZES)):
            meta = self._meta(at)
            if meta is not None and at in (0, meta[0]):
                found[meta[4]] = meta
        if not found:
            raise FormatError("no bolt file: neither of its two meta pages is valid", blob=self.name)
        return found[max(found)]

    # Returns page size, root, sequence, pages, transaction.
    def _meta(self, start: int) -> tuple[int, int, int, int, int] | None:
        if start + _PAGE.size + _META.size > len(self._data):
            return None
        if not _PAGE.unpack_from(self._data, start)[1] & _IS_META:
            return None
        at = start + _PAGE.size
        magic, version, page_size, _, root, sequence, _, pages, transaction, checksum = _META.unpack_from(
            self._data, at
        )
        if (magic, version) != (_MAGIC, _VERSION) or page_size not in _PAGE_SIZES:
            return None
        if checksum != _fnv1a(self._data[at : at + _META.size - 8]):
            return None
        return page_size, root, sequence, pages, transaction


class Bucket:
    """A map of names to bytes or buckets."""

    def __init__(self, file: BoltFile, root: int, sequence: int, inline: memoryview | None) -> None:
        self._file = file
        self._root = root
        self._inline = inline
        #: The last number that the bucket gave out.
        self.sequence = sequence

    def items(self) -> Iterator[tuple[bytes, bytes | Bucket]]:
        """Yield all entries, by name."""
        # Elements are decoded one at a time, as a page may claim to be most of the file.
        pending = [(self._root, 0)]
        left = self._file.most_pages + 1  # a page that comes twice makes a loop
        while pending:
            number, depth = pending.pop()
            left -= 1
            if depth > _MAX_DEPTH or left < 0:
                raise self._damaged("tree that is too deep, or has a page twice")
            page = self._inline if self._inline is not None else self._file.page(number)
            _, flags, count, _ = _PAGE.unpack_from(page)
            if flags & _IS_BRANCH and self._inline is None:
                pending += [(self._branch(page, index), depth + 1) for index in reversed(range(count))]
            elif flags & _IS_LEAF:
                for index in range(count):
                    yield self._leaf(page, index)
            else:
                raise self._damaged(f"page that is neither branch nor leaf (flags {flags})")

    def get(self, name: bytes) -> bytes | Bucket | None:
        """Return the value or bucket of a name, or None."""
        return next((value for key, value in self.items() if key == name), None)

    def bucket(self, name: bytes) -> Bucket:
        """Return the bucket of that name, an empty one if it is missing. Raises FormatError if it is a value."""
        found = self.get(name)
        if found is None:
            return Bucket(self._file, 0, 0, memoryview(_PAGE.pack(0, _IS_LEAF, 0, 0)))
        if not isinstance(found, Bucket):
            raise self._damaged(f"{name!r} that is no bucket")
        return found

    def _branch(self, page: memoryview, index: int) -> int:
        at = _PAGE.size + index * _BRANCH.size
        if at + _BRANCH.size > len(page):
            raise self._damaged("branch with more elements than fit")
        child: int = _BRANCH.unpack_from(page, at)[2]
        return child

    def _leaf(self, page: memoryview, index: int) -> tuple[bytes, bytes | Bucket]:
        at = _PAGE.size + index * _LEAF.size
        if at + _LEAF.size > len(page):
            raise self._damaged("leaf with more elements than fit")
        flags, position, key_size, value_size = _LEAF.unpack_from(page, at)
        start = at + position
        if start + key_size + value_size > len(page):
            raise self._damaged("element outside its page")
        name = bytes(page[start : start + key_size])
        value = page[start + key_size : start + key_size + value_size]
        if not flags & _IS_BUCKET:
            return name, bytes(value)
        if value_size < _BUCKET.size:
            raise self._damaged(f"bucket {name!r} without a header")
        root, sequence = _BUCKET.unpack_from(value)
        if root:
            return name, Bucket(self._file, root, sequence, None)
        if value_size < _BUCKET.size + _PAGE.size:
            raise self._damaged(f"inline bucket {name!r} without a page")
        return name, Bucket(self._file, 0, sequence, value[_BUCKET.size :])

    def _damaged(self, what: str) -> FormatError:
        return FormatError(f"damaged bolt file: {what}", blob=self._file.name)


def _fnv1a(data: bytes) -> int:
    total = 0xCBF29CE484222325
    for byte in data:
        total = (total ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return total
