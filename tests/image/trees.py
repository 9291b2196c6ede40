"""Blobs with hash trees, and origins that give wrong bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from obdlab.blob import Blob, ByteStream, MemoryBlob
from obdlab.cache.blockcache import BlockCache
from obdlab.cache.cachedblob import CachedBlob
from obdlab.call import Call
from obdlab.formats.hashtree import HashTree, TreeMaker
from obdlab.formats.oci import digest_of
from obdlab.image.checkedblob import CheckedBlob
from obdlab.image.treenodes import KeptNodes, TreeNodes

Change = Callable[[int, bytes], bytes]


def tree_of(data: bytes) -> HashTree:
    maker = TreeMaker()
    maker.update(data)
    return maker.finish(digest_of(data))


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


class Origin(MemoryBlob):
    """Answers, changed by ``change(offset, bytes)``; with ``heals``, only until a reader evicts something."""

    def __init__(self, data: bytes, change: Change | None = None, *, heals: bool = False) -> None:
        super().__init__(data, "origin")
        self.change = change
        self.heals = heals
        self.reads: list[tuple[int, int]] = []
        self.streams: list[tuple[int, int]] = []
        self.evicted: list[tuple[int, int]] = []
        self.closed = 0

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.reads.append((offset, length))
        return self.answer(offset, length)

    def answer(self, offset: int, length: int) -> bytes:
        data = super().read_at(offset, length)
        return data if self.change is None else self.change(offset, data)

    def stream(self, offset: int, length: int, call: Call | None = None) -> ByteStream:
        self.streams.append((offset, length))
        return _Coming(self, offset)

    def evict(self, offset: int, length: int) -> None:
        self.evicted.append((offset, length))
        if self.heals:
            self.change = None

    def close(self) -> None:
        self.closed += 1


def same_crc(page: bytes, bit: int = 80) -> bytes:
    """Return another page of the same CRC-32C: a multiple of the polynomial is added, from a bit of the page on."""
    polynomial = int(f"{0x11EDC6F41:b}"[::-1], 2)  # the first bit is the lowest
    return (int.from_bytes(page, "little") ^ polynomial << bit).to_bytes(len(page), "little")


class _Coming:
    def __init__(self, origin: Origin, position: int) -> None:
        self._origin = origin
        self.position = position

    def read(self, length: int, call: Call | None = None) -> bytes:
        data = self._origin.answer(self.position, length)
        self.position += length
        return data

    def close(self) -> None:
        pass


def flipped(bit: int) -> Change:
    """Flip a bit of the blob, by its number."""

    def change(offset: int, data: bytes) -> bytes:
        at = bit // 8 - offset
        if not 0 <= at < len(data):
            return data
        return data[:at] + bytes([data[at] ^ 1 << bit % 8]) + data[at + 1 :]

    return change


def forged(begin: int, data: bytes) -> Change:
    """Put other bytes at an offset of the blob."""

    def change(offset: int, answer: bytes) -> bytes:
        wrong = bytearray(answer)
        for at, byte in enumerate(data, begin - offset):
            if 0 <= at < len(wrong):
                wrong[at] = byte
        return bytes(wrong)

    return change


def checked(origin: Blob, data: bytes, file: Blob | None = None, tree: HashTree | None = None) -> CheckedBlob:
    """Return ``origin`` checked by the tree of ``data``; ``file`` answers for the tree's file."""
    tree = tree or tree_of(data)
    if file is None and tree.file:
        file = Origin(tree.file)
    nodes = TreeNodes("layer", digest_of(data), len(data), tree.reference, file, KeptNodes())
    return CheckedBlob(origin, nodes)


def cached(directory: Path, origin: Blob, data: bytes, **options: int) -> CachedBlob:
    """Return the same through the block cache, whose files are checked by the tree, too."""
    blob = checked(origin, data)
    made = BlockCache(directory, **{"readahead_max": 0, **options}).open(blob, digest_of(data), blob._nodes)
    assert isinstance(made, CachedBlob)
    return made
