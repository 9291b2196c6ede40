"""A bolt file as bytes: every kind of page, and buckets inline and with pages of their own."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

_PAGE_SIZE = 1024
_BRANCH, _LEAF, _META, _FREELIST = 1, 2, 4, 16

Tree = dict[bytes, "bytes | Tree"]
# What an element's head is, by where its data begin (from the head on), and the data.
_Element = tuple[Callable[[int], bytes], bytes]


def bolt_file(tree: Tree, transaction: int = 5) -> bytes:
    """Return the file that holds ``tree``; buckets of at most three values lie inline, the root has a branch."""
    pages = _Pages()
    root = pages.add_tree(tree, split=True)
    return b"".join(
        [
            _meta(0, root, pages.next, transaction),
            _meta(1, root, pages.next, transaction - 1),
            struct.pack("<QHHI", 2, _FREELIST, 0, 0).ljust(_PAGE_SIZE, b"\0"),
            *pages.written,
        ]
    )


@dataclass
class _Pages:
    next: int = 3
    written: list[bytes] = field(default_factory=list)

    def add_tree(self, tree: Tree, *, split: bool = False) -> int:
        names = sorted(tree)
        half = len(names) // 2 or 1
        parts = [part for part in (names[:half], names[half:]) if part] if split else [names]
        leaves = [self._add(_LEAF, [self._leaf(name, tree[name]) for name in part]) for part in parts]
        if not split:
            return leaves[0]
        return self._add(_BRANCH, [_branch(part[0], leaf) for part, leaf in zip(parts, leaves, strict=True)])

    def _leaf(self, name: bytes, value: bytes | Tree) -> _Element:
        flags, data = (0, value) if isinstance(value, bytes) else (1, self._bucket(value))
        return lambda position: struct.pack("<IIII", flags, position, len(name), len(data)), name + data

    def _bucket(self, tree: Tree) -> bytes:
        if len(tree) <= 3 and all(isinstance(each, bytes) for each in tree.values()):
            return struct.pack("<QQ", 0, 7) + _page(0, _LEAF, [self._leaf(*each) for each in sorted(tree.items())])
        return struct.pack("<QQ", self.add_tree(tree), 7)

    def _add(self, kind: int, elements: list[_Element]) -> int:
        number = self.next
        page = _page(number, kind, elements)
        self.next += -(-len(page) // _PAGE_SIZE)
        self.written.append(page.ljust((self.next - number) * _PAGE_SIZE, b"\0"))
        return number


def _branch(name: bytes, child: int) -> _Element:
    return lambda position: struct.pack("<IIQ", position, len(name), child), name


def _page(number: int, kind: int, elements: list[_Element]) -> bytes:
    heads, data = b"", b""
    for index, (head, content) in enumerate(elements):
        heads += head(16 * (len(elements) - index) + len(data))
        data += content
    overflow = (16 + len(heads) + len(data) - 1) // _PAGE_SIZE
    return struct.pack("<QHHI", number, kind, len(elements), overflow) + heads + data


def _meta(number: int, root: int, pages: int, transaction: int) -> bytes:
    body = struct.pack("<IIIIQQQQQ", 0xED0CDAED, 2, _PAGE_SIZE, 0, root, 0, 2, pages, transaction)
    checksum = 0xCBF29CE484222325
    for byte in body:
        checksum = (checksum ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    head = struct.pack("<QHHI", number, _META, 0, 0)
    return (head + body + struct.pack("<Q", checksum)).ljust(_PAGE_SIZE, b"\0")


def snapshots(count: int = 6) -> Tree:
    """The original snapshotter's tree: each snapshot the next one's parent."""
    time = b"\x01" + struct.pack(">qIh", 63_900_000_000, 5, -1)
    found: Tree = {}
    for number in range(1, count + 1):
        found[b"chain-%d" % number] = {
            b"id": bytes([number]),
            b"kind": bytes([3 if number < count else 2]),
            b"parent": b"chain-%d" % (number - 1) if number > 1 else b"",
            b"createdat": time,
            b"updatedat": time,
            b"inodes": b"\x02",
            b"size": b"\x80\x20",
            b"labels": {b"containerd.io/snapshot.ref": b"chain-%d" % number, b"a": b"b" * 40},
        }
    return {b"v1": {b"snapshots": found, b"other": {b"x": b"y"}}, b"zz": {b"1": b"2"}}
