"""Hash trees of layer blobs: each unit of a blob can be checked without the rest of it.

::

    leaf hash    SHA-256(tag "leaf" + the unit's bytes); units of 16 KiB, the last may be shorter
    node         up to 512 hashes of 32 bytes, one after another: of units, or of the nodes one level below
    node hash    SHA-256(tag "node" + u32 level, 4 pad, u64 number + the node's bytes)
    top          the hash alone at its level: the leaf hash of a blob of one unit, else the hash of the top node
    root         SHA-256(tag "root" + u32 unit, u32 hashes of a node, u64 size of the blob, SHA-256 of the blob + top)

A tag is ``obdlab hash tree 1 <name>`` padded with zeros to 64 bytes, a block of SHA-256; numbers are little-endian.
The file has the nodes of level 1, then those of level 2, up to the top node; it is empty for a blob of one unit. So a
node of level 1 is one unit of the block cache, those of adjacent ranges are adjacent, and the end of a blob, which is
read at every opening, is checked by the end of the file. The file's size follows from the blob's: a 511th of it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from obdlab.errors import FormatError
from obdlab.formats.oci import check_digest

if TYPE_CHECKING:
    from obdlab.blob import Buffer

#: Bytes of a blob that are checked together: the block cache's unit.
UNIT = 16 << 10
FAN_OUT = 512
HASH_SIZE = 32
NODE_SIZE = FAN_OUT * HASH_SIZE
#: Bytes of a blob below one node of level 1.
NODE_SPAN = FAN_OUT * UNIT

_TAG_SIZE = 64
_NODE = struct.Struct("<I4xQ")
_ROOT = struct.Struct("<IIQ32s")


def _tagged(name: str) -> hashlib._Hash:
    return hashlib.sha256(f"obdlab hash tree 1 {name}".encode().ljust(_TAG_SIZE, b"\0"))


# Copied for each hash: the tag is hashed once.
_LEAF_TAG, _NODE_TAG, _ROOT_TAG = _tagged("leaf"), _tagged("node"), _tagged("root")


@dataclass(frozen=True, slots=True)
class TreeReference:
    """The two digests that a layer's annotation has: the root, and the digest of the tree's file."""

    root: str
    file: str

    @classmethod
    def parse(cls, text: str, blob: str = "") -> Self:
        """Read ``<root>,<file>``. Raises FormatError naming ``blob``."""
        root, _, file = text.partition(",")
        return cls(check_digest(root, blob), check_digest(file, blob))

    def __str__(self) -> str:
        return f"{self.root},{self.file}"

    @property
    def cache_name(self) -> str:
        """Name for caches of checked units: a different one for each root, and no registry's."""
        return f"tree+{self.root.removeprefix('sha256:')}"


class NodeId(NamedTuple):
    """A node: its level, from 1 on, and its number in the level."""

    level: int
    number: int


class Shape:
    """The nodes of a blob's tree and their places in its file. ``size`` is the blob's, in bytes, more than 0."""

    def __init__(self, size: int) -> None:
        if size <= 0:
            raise ValueError(f"hash tree of a blob without bytes (got {size})")
        self.size = size
        self.units = -(-size // UNIT)
        # For each level from 1 on: its offset in the file, and its number of hashes.
        self._levels: list[tuple[int, int]] = []
        offset, hashes = 0, self.units
        while hashes > 1:
            self._levels.append((offset, hashes))
            offset += hashes * HASH_SIZE
            hashes = -(-hashes // FAN_OUT)
        #: Bytes of the tree's file.
        self.file_size = offset

    @property
    def levels(self) -> int:
        """The level of the top node; 0 for a blob of one unit, which has no nodes."""
        return len(self._levels)

    def place(self, node: NodeId) -> tuple[int, int]:
        """Return a node's offset and length in the file."""
        offset, hashes = self._levels[node.level - 1]
        first = node.number * FAN_OUT
        return offset + first * HASH_SIZE, min(FAN_OUT, hashes - first) * HASH_SIZE

    def above(self, node: NodeId) -> tuple[NodeId, int] | None:
        """Return the node that has the hash of ``node``, and the hash's number there; None for the top node."""
        if node.level == self.levels:
            return None
        return NodeId(node.level + 1, node.number // FAN_OUT), node.number % FAN_OUT


def leaf_hash(unit: Buffer) -> bytes:
    """Return the hash of a unit's bytes."""
    state = _LEAF_TAG.copy()
    state.update(unit)
    return state.digest()


def node_hash(node: NodeId, data: Buffer) -> bytes:
    """Return the hash of a node's bytes."""
    state = _NODE_TAG.copy()
    state.update(_NODE.pack(node.level, node.number))
    state.update(data)
    return state.digest()


def root_of(size: int, digest: str, top: bytes) -> str:
    """Return the root, as a digest, of a blob of that size and ``digest``. Raises FormatError for a bad digest."""
    state = _ROOT_TAG.copy()
    whole = bytes.fromhex(check_digest(digest).removeprefix("sha256:"))
    state.update(_ROOT.pack(UNIT, FAN_OUT, size, whole))
    state.update(top)
    return f"sha256:{state.hexdigest()}"


class HashTree(NamedTuple):
    """A finished tree: the root, and the bytes of the file."""

    root: str
    file: bytes

    @property
    def reference(self) -> TreeReference:
        """The text for the layer's annotation."""
        return TreeReference(self.root, f"sha256:{hashlib.sha256(self.file).hexdigest()}")


class TreeMaker:
    """Makes the tree of a blob whose bytes come in order, in any pieces. Holds 32 bytes for each unit."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._size = 0
        self._rest = bytearray()
        self._leaves = bytearray()

    def update(self, data: Buffer) -> None:
        """Add the next bytes."""
        self._whole.update(data)
        self._size += len(data)
        view = memoryview(data)
        if self._rest:
            missing = UNIT - len(self._rest)
            self._rest += view[:missing]
            view = view[missing:]
            if len(self._rest) < UNIT:
                return
            self._leaves += leaf_hash(self._rest)
            self._rest.clear()
        whole = len(view) - len(view) % UNIT
        for start in range(0, whole, UNIT):
            self._leaves += leaf_hash(view[start : start + UNIT])
        self._rest += view[whole:]

    def finish(self, digest: str, *, blob: str = "") -> HashTree:
        """Return the tree of all bytes, which are those of ``digest``. Nothing may be added afterwards.

        Raises FormatError naming ``blob`` if the bytes have another digest, or if there are no bytes.
        """
        got = f"sha256:{self._whole.hexdigest()}"
        if got != digest or not self._size:
            raise FormatError("wrong content", blob=blob, got=f"{got}, {self._size} bytes", wanted=digest)
        if self._rest:
            self._leaves += leaf_hash(self._rest)
            self._rest.clear()
        file = bytearray()
        hashes, level = self._leaves, 1
        while len(hashes) > HASH_SIZE:
            file += hashes
            view = memoryview(hashes)
            starts = range(0, len(hashes), NODE_SIZE)
            hashes = bytearray(
                b"".join(
                    node_hash(NodeId(level, start // NODE_SIZE), view[start : start + NODE_SIZE]) for start in starts
                )
            )
            level += 1
        return HashTree(root_of(self._size, digest, bytes(hashes)), bytes(file))
