"""Hash trees: against a plain recursion, bit by bit, and at the sizes where their shape changes."""

from __future__ import annotations

import hashlib
import itertools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.formats.hashtree import (
    FAN_OUT,
    HASH_SIZE,
    NODE_SIZE,
    UNIT,
    HashTree,
    NodeId,
    Shape,
    TreeMaker,
    TreeReference,
    leaf_hash,
    node_hash,
    root_of,
)
from obdlab.formats.oci import digest_of


def made(data: bytes, pieces: list[int] | None = None) -> HashTree:
    maker = TreeMaker()
    at = 0
    for length in pieces or []:
        maker.update(data[at : at + length])
        at += length
    maker.update(data[at:])
    return maker.finish(digest_of(data))


# The definition, written down once more: a level is a list of hashes.
def tagged(name: str, *parts: bytes) -> bytes:
    return hashlib.sha256(b"".join([f"obdlab hash tree 1 {name}".encode().ljust(64, b"\0"), *parts])).digest()


def plain_tree(data: bytes) -> tuple[str, bytes]:
    level = [tagged("leaf", data[at : at + 16384]) for at in range(0, len(data), 16384)]
    file, number = b"", 1
    while len(level) > 1:
        file += b"".join(level)
        nodes = [b"".join(level[at : at + 512]) for at in range(0, len(level), 512)]
        level = [tagged("node", struct.pack("<IIQ", number, 0, at), node) for at, node in enumerate(nodes)]
        number += 1
    head = struct.pack("<IIQ", 16384, 512, len(data)) + hashlib.sha256(data).digest()
    return "sha256:" + tagged("root", head, level[0]).hex(), file


@pytest.mark.parametrize(
    "size", [1, 100, UNIT - 1, UNIT, UNIT + 1, 2 * UNIT, 5 * UNIT + 7, FAN_OUT * UNIT, FAN_OUT * UNIT + 1]
)
def test_it_is_the_tree_of_the_definition(size: int) -> None:
    data = random.Random(size).randbytes(size)
    tree = made(data)
    assert (tree.root, tree.file) == plain_tree(data)
    assert len(tree.file) == Shape(size).file_size
    assert tree.reference == TreeReference.parse(f"{tree.root},{digest_of(tree.file)}")


def test_a_known_root() -> None:
    # Fixed: a change of the format changes it, and with it the roots in all manifests.
    assert made(bytes(range(256)) * 300).root == (
        "sha256:10c7d6f5c5c123d6ecb56d744b3d108a1cb6155718d388dce692b1a4fa7613fd"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6 * UNIT), st.lists(st.integers(0, 2 * UNIT), max_size=8))
def test_pieces_do_not_matter(size: int, pieces: list[int]) -> None:
    data = random.Random(size).randbytes(size)
    assert made(data, pieces) == made(data)


@given(st.integers(1, 1 << 62))
def test_nodes_fill_the_file_in_order_and_lead_to_the_top(size: int) -> None:
    shape = Shape(size)
    assert shape.units == -(-size // UNIT)
    if size >= 4 * UNIT:
        assert shape.file_size <= size * 0.0025 + HASH_SIZE
    end = 0
    hashes = shape.units
    for level in range(1, shape.levels + 1):
        last = -(-hashes // FAN_OUT) - 1
        assert shape.place(NodeId(level, 0))[0] == end
        offset, length = shape.place(NodeId(level, last))
        assert 0 < length <= NODE_SIZE
        end += hashes * HASH_SIZE
        assert offset + length == end
        above = shape.above(NodeId(level, last))
        assert (above is None) == (level == shape.levels)
        if above is not None:
            assert above == (NodeId(level + 1, last // FAN_OUT), last % FAN_OUT)
        hashes = last + 1
    assert hashes == 1
    assert end == shape.file_size


def test_layers_of_64_kib_and_more_get_a_tree_of_a_400th_at_most() -> None:
    for size in [64 << 10, (64 << 10) + 1, 1 << 20, (8 << 20) + 1, 1 << 30, (4 << 30) + 1, 1 << 40]:
        assert Shape(size).file_size <= max(size * 0.0025, 5 * HASH_SIZE)


def test_kinds_levels_and_places_have_different_hashes() -> None:
    data = bytes(NODE_SIZE)
    found = [
        leaf_hash(data),
        hashlib.sha256(data).digest(),
        *(node_hash(NodeId(*place), data) for place in itertools.product((1, 2), (0, 1, 256))),
    ]
    assert len(set(found)) == len(found)


def test_size_and_digest_are_part_of_the_root() -> None:
    digest, other = digest_of(b"1"), digest_of(b"2")
    roots = {root_of(5, digest, bytes(32)), root_of(6, digest, bytes(32)), root_of(5, other, bytes(32))}
    assert len(roots) == 3
    with pytest.raises(FormatError, match="not a digest"):
        root_of(5, "sha256:12", bytes(32))


def test_a_tree_is_only_made_of_the_digests_bytes() -> None:
    maker = TreeMaker()
    maker.update(b"content")
    with pytest.raises(FormatError, match=r"layer 1: wrong content \(got sha256:.*, 7 bytes, wanted sha256:"):
        maker.finish(digest_of(b"other content"), blob="layer 1")
    with pytest.raises(FormatError, match="wrong content"):
        TreeMaker().finish(digest_of(b""))


@pytest.mark.parametrize("text", ["", ",", "sha256:12,sha256:34", digest_of(b""), f"{digest_of(b'')},", "x" * 9000])
def test_malformed_references_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="layer 3: not a digest"):
        TreeReference.parse(text, "layer 3")


@pytest.mark.parametrize("size", [0, -1])
def test_no_tree_of_nothing(size: int) -> None:
    with pytest.raises(ValueError, match="without bytes"):
        Shape(size)
