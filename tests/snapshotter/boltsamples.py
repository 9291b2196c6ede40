"""A bolt file as bytes: every kind of page, and buckets inline and with pages of their own."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

_PAGE_SIZE = 1024
_BRANCH, _LEAF, _META, _FREELIST = 1, 2, 4, 16

Tree = dict[bytes, "bytes | Tree"]


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
        items = [self._item(name, value) for name, value in sorted(tree.items())]
        if not split:
            return self._add(_LEAF, items)
        half = len(items) // 2 or 1
        children = [(part[0][1], self._add(_LEAF, part)) for part in (items[:half], items[half:]) if part]
        return self._add(_BRANCH, children)

    # Flags, name, value.
    def _item(self, name: bytes, value: bytes | Tree) -> tuple[int, bytes, bytes]:
        if isinstance(value, bytes):
            return 0, name, value
        if len(value) <= 3 and all(isinstance(each, bytes) for each in value.values()):
            items = [self._item(*each) for each in sorted(value.items())]
            return 1, name, struct.pack("<QQ", 0, 7) + _page(0, _LEAF, items)
        return 1, name, struct.pack("<QQ", self.add_tree(value), 7)

    def _add(self, kind: int, items: list[tuple[int, bytes, bytes]] | list[tuple[bytes, int]]) -> int:
        number = self.next
        page = _page(number, kind, items)
        self.next += -(-len(page) // _PAGE_SIZE)
        self.written.append(page.ljust((self.next - number) * _PAGE_SIZE, b"\0"))
        return number


def _page(number: int, kind: int, items: list[tuple[int, bytes, bytes]] | list[tuple[bytes, int]]) -> bytes:
    heads, data = b"", b""
    for index, item in enumerate(items):
        position = 16 * (len(items) - index) + len(data)
        if kind == _LEAF:
            flags, name, value = item  # type: ignore[misc]
            heads += struct.pack("<IIII", flags, position, len(name), len(value))
            data += name + value
        else:
            name, child = item  # type: ignore[misc]
            heads += struct.pack("<IIQ", position, len(name), child)
            data += name
    overflow = (16 + len(heads) + len(data) - 1) // _PAGE_SIZE
    return struct.pack("<QHHI", number, kind, len(items), overflow) + heads + data


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
