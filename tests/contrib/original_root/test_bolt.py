"""bbolt files: what they hold, and errors for damage. (test_importing reads what a real containerd wrote.)"""

from __future__ import annotations

import random
import struct
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.contrib.original_root import importing
from obdlab.contrib.original_root.bolt import BoltFile, Bucket
from obdlab.contrib.original_root.importing import read_snapshots
from obdlab.errors import FormatError
from tests.contrib.original_root.boltsamples import Tree, bolt_file, snapshots


def tree_of(bucket: Bucket) -> Tree:
    return {name: tree_of(value) if isinstance(value, Bucket) else value for name, value in bucket.items()}


def test_a_tree_is_as_it_was(tmp_path: Path) -> None:
    source = random.Random(5)
    tree: Tree = {
        b"small": {b"a": b"1"},
        b"empty": {},
        b"large": {b"%05d" % number: source.randbytes(100) for number in range(300)},  # overflows its page
        b"nested": {b"in": {b"it": {b"k%d" % number: b"v" for number in range(9)}}, b"value": b"x"},
        b"value": b"y" * 500,
    }
    path = tmp_path / "meta.db"
    path.write_bytes(bolt_file(tree))
    with BoltFile(path) as file:
        assert tree_of(file.root) == tree
        assert file.transaction == 5
        assert file.root.get(b"value") == b"y" * 500
        assert file.root.get(b"none") is None
        assert list(file.root.bucket(b"none").items()) == []
        with pytest.raises(FormatError, match="no bucket"):
            file.root.bucket(b"value")


@pytest.mark.parametrize("text", [b"", b"x", bytes(16), bytes(4096), b"\0" * 16 + b"\xed\xda\x0c\xed"])
def test_what_is_no_bolt_file(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "meta.db").write_bytes(text)
    with pytest.raises(FormatError, match=r"meta\.db"):
        BoltFile(tmp_path / "meta.db")


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_gos_numbers(number: int) -> None:
    """encoding/binary's varint: zigzag, seven bits a byte, the last one below 128."""
    left, coded = (number << 1) ^ (number >> 63), bytearray()
    while left >= 128:
        coded.append(left & 127 | 128)
        left >>= 7
    coded.append(left)
    assert importing._varint(bytes(coded)) == number
    assert importing._varint(bytes(coded) + b"more") == number
    with pytest.raises(ValueError, match="not a number"):
        importing._uvarint(bytes(each | 128 for each in coded))


@pytest.mark.parametrize(
    ("seconds", "nanoseconds"), [(0, 0), (1, 0), (1_700_000_000, 1), (1_700_000_000, 999_999_999), (-5, 0)]
)
@pytest.mark.parametrize("version", [1, 2])
def test_gos_times(seconds: int, nanoseconds: int, version: int) -> None:
    since_year_one = seconds + (date(1970, 1, 1) - date(1, 1, 1)).days * 86400
    data = bytes([version]) + struct.pack(">qih", since_year_one, nanoseconds, -1) + bytes(version - 1)
    assert importing._time_ns(data) == max(0, seconds * 10**9 + nanoseconds)
    assert importing._time_ns(b"\7" + data[1:]) == importing._time_ns(data[:-2]) == importing._time_ns(b"") == 0


def test_snapshots_come_parents_first(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    path.write_bytes(bolt_file(snapshots(5)))
    with BoltFile(path) as file:
        found, last_id = read_snapshots(file)
    assert [snapshot.key for snapshot in found] == [f"chain-{number}" for number in range(1, 6)]
    assert [snapshot.usage.size for snapshot in found] == [2048] * 5
    assert last_id == 7


def test_a_branch_of_endless_children_is_refused_after_each_page_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 63 times the same child, each of which would be a copy of most of the file.
    data = bytearray(bolt_file({b"a": b"1", b"b": b"2"}))
    child, root = 3, 5
    data += bytes((1 << 20) - 2 * 1024)
    data[child * 1024 + 12 : child * 1024 + 16] = ((1 << 10) - 4).to_bytes(4, "little")
    data[root * 1024 + 10 : root * 1024 + 12] = (63).to_bytes(2, "little")
    for index in range(63):
        at = root * 1024 + 16 + 16 * index
        data[at : at + 16] = bytes(8) + child.to_bytes(8, "little")
    path = tmp_path / "meta.db"
    path.write_bytes(bytes(data))
    read = []
    page = BoltFile.page
    monkeypatch.setattr(BoltFile, "page", lambda self, number: read.append(number) or page(self, number))
    with BoltFile(path) as file:
        with pytest.raises(FormatError, match="a page twice"):
            for _ in file.root.items():
                pass
        assert len(read) <= file.pages + 1 == 7
