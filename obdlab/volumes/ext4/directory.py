"""Directories as ext4 stores them: blocks of entries, and for large ones a tree over the names' hashes. Pure.

Source: kernel documentation, "ext4 Data Structures and Algorithms", directory entries. The hash is the first of the
tree's hash versions, half of MD4 over the name; its seed and the signedness of characters are in the superblock.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from obdlab.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: name, inode, type
Entry = tuple[bytes, int, int]

FILE, DIRECTORY, CHARACTER, BLOCK, FIFO, SOCKET, SYMLINK = 1, 2, 3, 4, 5, 6, 7
HALF_MD4 = 1

_HEAD = struct.Struct("<IHBB")
_TREE_ENTRY = struct.Struct("<II")
_CHECKSUM_TAIL = 0xDE
# A directory of more blocks gets a tree.
_LINEAR_BLOCKS = 2
# Fill of a tree's leaves, so that names of a later layer have room.
_LEAF_FILL = 0.85


def need(name_length: int) -> int:
    """Return the number of bytes of an entry."""
    return 8 + name_length + 3 & ~3


def parse_block(raw: bytes | bytearray, name: str = "") -> list[Entry]:
    """Read the entries of one block, "." and ".." included. Raises FormatError."""
    found = []
    at, end = 0, len(raw)
    while at < end:
        if at + 8 > end:
            raise FormatError("damaged directory block", blob=name, offset=at)
        inode, length, name_length, kind = _HEAD.unpack_from(raw, at)
        length = length or 1 << 16  # a block of 64 KiB
        if (inode and length < need(name_length)) or length < 8 or length % 4 or at + length > end:
            raise FormatError("damaged directory entry", blob=name, offset=at, got=(inode, length, name_length))
        if inode:
            found.append((bytes(raw[at + 8 : at + 8 + name_length]), inode, kind))
        at += length
    return found


def pack_block(entries: Sequence[Entry], size: int) -> bytes:
    """Return a block of the entries; the last entry takes the rest."""
    if not entries:
        return _HEAD.pack(0, size, 0, 0).ljust(size, b"\0")
    parts = []
    used = 0
    for name, inode, kind in entries[:-1]:
        length = need(len(name))
        parts.append(_HEAD.pack(inode, length, len(name), kind) + name.ljust(length - 8, b"\0"))
        used += length
    name, inode, kind = entries[-1]
    parts.append(_HEAD.pack(inode, size - used, len(name), kind) + name)
    return b"".join(parts).ljust(size, b"\0")


def used_in(entries: Sequence[Entry]) -> int:
    """Return the bytes that the entries need."""
    return sum(need(len(name)) for name, _, _ in entries)


def build(
    entries: Sequence[Entry], own: int, parent: int, size: int, seed: Sequence[int]
) -> tuple[list[bytes], bool]:
    """Return the blocks of a directory, and True if they are a tree. ``entries`` are without "." and ".."."""
    dots = [(b".", own, DIRECTORY), (b"..", parent, DIRECTORY)]
    linear = _fill([*dots, *entries], size, size)
    if len(linear) <= _LINEAR_BLOCKS:
        return [pack_block(block, size) for block in linear], False
    return _tree(entries, dots, size, seed), True


def _fill(entries: Sequence[Entry], size: int, limit: int) -> list[list[Entry]]:
    blocks: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        length = need(len(entry[0]))
        if used + length > limit and used:
            blocks.append([])
            used = 0
        blocks[-1].append(entry)
        used += length
    return blocks


def _tree(entries: Sequence[Entry], dots: Sequence[Entry], size: int, seed: Sequence[int]) -> list[bytes]:
    # Root in block 0, then inner nodes, then leaves.
    hashes = hash_names([entry[0] for entry in entries], seed)
    order = np.lexsort((np.arange(len(entries)), hashes))
    leaves = _fill([entries[number] for number in order.tolist()], size, int(size * _LEAF_FILL))
    firsts = np.cumsum([0] + [len(leaf) for leaf in leaves[:-1]])
    ordered = hashes[order]
    starts = []
    for number, first in enumerate(firsts.tolist()):
        goes_on = number and ordered[first] == ordered[first - 1]
        starts.append(int(ordered[first]) | int(goes_on) if number else 0)
    root_limit, node_limit = (size - 32) // 8, (size - 8) // 8
    nodes = -(-len(leaves) // node_limit) if len(leaves) > root_limit else 0
    if nodes > root_limit:
        raise FormatError("directory has too many entries", got=len(entries))
    leaf_block = 1 + nodes
    children = [(start, leaf_block + number) for number, start in enumerate(starts)]
    inner = []
    if nodes:
        groups = [children[at : at + node_limit] for at in range(0, len(children), node_limit)]
        inner = [_HEAD.pack(0, size, 0, 0) + _tree_entries(group, node_limit) for group in groups]
        children = [(group[0][0], 1 + number) for number, group in enumerate(groups)]
    head = pack_block(dots, size)[:24] + struct.pack("<IBBBB", 0, HALF_MD4, 8, 1 if nodes else 0, 0)
    root = head + _tree_entries(children, root_limit)
    return [block.ljust(size, b"\0") for block in (root, *inner)] + [pack_block(leaf, size) for leaf in leaves]


def _tree_entries(children: Sequence[tuple[int, int]], limit: int) -> bytes:
    # The counts take the place of the first child's hash.
    body = b"".join(_TREE_ENTRY.pack(*child) for child in children)
    return struct.pack("<HH", limit, len(children)) + body[4:]


def leaf_of(blocks: Sequence[bytes | bytearray], wanted: int, name: str = "") -> int:
    """Return the number of the block for names with a hash, given all blocks of a tree. Raises FormatError."""
    levels = blocks[0][30]
    if blocks[0][28] != HALF_MD4 or levels > 1:
        raise FormatError("directory tree of a kind that is not known", blob=name)
    number = _child(blocks[0], 32, wanted, len(blocks), name)
    return _child(blocks[number], 8, wanted, len(blocks), name) if levels else number


def _child(block: bytes | bytearray, at: int, wanted: int, blocks: int, name: str) -> int:
    _, count = struct.unpack_from("<HH", block, at)
    if not 0 < count <= (len(block) - at) // 8:
        raise FormatError("damaged directory tree", blob=name, got=count)
    table = np.frombuffer(block, "<u4", 2 * count, at).reshape(-1, 2)
    position = int(np.searchsorted(table[1:, 0], wanted, side="right"))
    child = int(table[position, 1])
    if not 0 < child < blocks:
        raise FormatError("damaged directory tree", blob=name, got=child)
    return child


def hash_names(names: Sequence[bytes], seed: Sequence[int]) -> NDArray[np.uint32]:
    """Return the half-MD4 hash of each name with signed characters, the order of ext4's trees."""
    lengths = np.fromiter(map(len, names), np.int64, len(names))
    chunks = max(1, -(-int(lengths.max(initial=1)) // 32))
    padded = b"".join(name.ljust(chunks * 32, b"\0") for name in names)
    characters = np.frombuffer(padded, np.int8).reshape(len(names), chunks, 8, 4).astype(np.int32).view(np.uint32)
    start = seed if any(seed) else (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
    state = np.tile(np.array(start, np.uint32), (len(names), 1))
    for chunk in range(chunks):
        left = lengths - 32 * chunk
        here = left > 0
        words = _words(characters[here, chunk], left[here])
        state[here] = _half_md4(state[here], words)
    found = state[:, 1] & np.uint32(0xFFFFFFFE)
    found[found == 0xFFFFFFFE] = 0xFFFFFFFC  # the largest value marks the end
    return found


def _words(characters: NDArray[np.uint32], left: NDArray[np.int64]) -> NDArray[np.uint32]:
    # Eight words of four characters, filled up with the number of characters left.
    pad = (left & 0xFF).astype(np.uint32)
    pad = pad | pad << np.uint32(8)
    pad = pad | pad << np.uint32(16)
    words = np.repeat(pad[:, None], 8, axis=1)
    for place in range(4):
        is_there = left[:, None] > np.arange(8)[None, :] * 4 + place
        words = np.where(is_there, (words << np.uint32(8)) + characters[:, :, place], words)
    return words


_ROUNDS = (
    (0, (0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19)),
    (0x5A827999, (1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13)),
    (0x6ED9EBA1, (3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15)),
)


def _half_md4(state: NDArray[np.uint32], words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    a, b, c, d = (state[:, column].copy() for column in range(4))
    for number, (constant, order, shifts) in enumerate(_ROUNDS):
        for step, word in enumerate(order):
            if number == 0:
                mixed = d ^ (b & (c ^ d))
            elif number == 1:
                mixed = (b & c) + ((b ^ c) & d)
            else:
                mixed = b ^ c ^ d
            total = a + mixed + words[:, word] + np.uint32(constant)
            shift = np.uint32(shifts[step % 4])
            a, b, c, d = d, total << shift | total >> (np.uint32(32) - shift), b, c
    return state + np.stack((a, b, c, d), axis=1)
