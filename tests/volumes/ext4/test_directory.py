"""Names' hashes and trees, beside what e2fsprogs and the kernel make of them."""

from __future__ import annotations

import itertools
import subprocess
import uuid
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.volumes.ext4 import directory

if TYPE_CHECKING:
    from pathlib import Path

SEED = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
NAMES = [b"a", b"abc", b"abcd", b"x" * 31, b"y" * 32, b"z" * 33, b"w" * 64, b"q" * 65, b"n" * 255, "Grüße-Ω".encode()]
names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name.strip(b".")
)


def seed_words(seed: uuid.UUID) -> list[int]:
    return [int.from_bytes(seed.bytes[at : at + 4], "little") for at in range(0, 16, 4)]


@pytest.mark.parametrize("seed", [uuid.UUID(int=0), SEED])
def test_hashes_are_those_of_e2fsprogs(tmp_path: Path, seed: uuid.UUID) -> None:
    requests = "\n".join(f"dx_hash -h half_md4 -s {seed} {name.decode()}" for name in NAMES)
    (tmp_path / "requests").write_text(requests)
    command = ["debugfs", "-f", str(tmp_path / "requests")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # debugfs hashes characters as unsigned or signed by the machine it was built for; plain ASCII is the same.
    wanted = [int(line.split(" is 0x")[1].split()[0], 16) for line in told.splitlines() if " is 0x" in line]
    assert len(wanted) == len(NAMES)
    got = directory.hash_names(NAMES, seed_words(seed)).tolist()
    assert got[:-1] == wanted[:-1]


@given(st.lists(names, unique=True, max_size=60))
def test_blocks_give_back_what_they_hold(listed: list[bytes]) -> None:
    entries = [(name, number + 11, directory.FILE) for number, name in enumerate(listed)]
    blocks, is_tree = directory.build(entries, 5, 2, 4096, (0, 0, 0, 0))
    found = [entry for block in blocks for entry in directory.parse_block(block) if entry[0] not in (b".", b"..")]
    assert sorted(found) == sorted(entries)
    assert is_tree == (len(blocks) > 2)
    assert all(len(block) == 4096 for block in blocks)


@settings(max_examples=20, deadline=None)
@given(st.integers(700, 3000), st.integers(0, 1000))
def test_a_tree_leads_to_every_name(count: int, salt: int) -> None:
    entries = [(b"%d name %d" % (salt, number), number + 11, directory.FILE) for number in range(count)]
    blocks, is_tree = directory.build(entries, 5, 2, 4096, seed_words(SEED))
    assert is_tree
    for entry, wanted in zip(entries, directory.hash_names([e[0] for e in entries], seed_words(SEED)), strict=True):
        leaf = directory.leaf_of(blocks, int(wanted))
        # Of names with one hash, those that begin the next leaf are found by going on.
        assert entry in directory.parse_block(blocks[leaf]) or entry in directory.parse_block(blocks[leaf + 1])


def test_a_tree_of_two_levels_leads_to_every_name() -> None:
    # A root has 508 children at most: names of 250 bytes need more leaves than that.
    names = [b"%05d" % number + b"n" * 245 for number in range(8000)]
    entries = [(name, number + 11, directory.FILE) for number, name in enumerate(names)]
    blocks, is_tree = directory.build(entries, 5, 2, 4096, seed_words(SEED))
    assert is_tree
    assert blocks[0][30] == 1
    found = []
    for block in blocks[3:]:
        found += directory.parse_block(block)
    assert sorted(found) == entries
    assert directory.parse_block(blocks[1]) == directory.parse_block(blocks[2]) == []
    hashes = directory.hash_names(names, seed_words(SEED)).tolist()
    for entry, wanted in list(zip(entries, hashes, strict=True))[::7]:
        assert entry in directory.parse_block(blocks[directory.leaf_of(blocks, wanted)])


def test_a_directory_that_no_tree_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    # 508 nodes of 511 leaves; blocks of 256 bytes have 28 and 31.
    names = [b"%05d" % number + b"n" * 200 for number in range(28 * 31 + 1)]
    entries = [(name, number + 11, directory.FILE) for number, name in enumerate(names)]
    blocks, _ = directory.build(entries[:-1], 5, 2, 256, (0, 0, 0, 0))
    assert len(blocks) == 1 + 28 + 28 * 31
    with pytest.raises(FormatError, match="too many entries"):
        directory.build(entries, 5, 2, 256, (0, 0, 0, 0))


def test_a_leaf_that_goes_on_with_a_hash_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel looks into the next leaf for a name if the lowest bit of that leaf's first hash is set.
    entries = [(b"%03d" % number + b"n" * 200, number + 11, directory.FILE) for number in range(80)]
    hashes = np.array([1000 if number < 40 else 2000 for number in range(80)], np.uint32)
    monkeypatch.setattr(directory, "hash_names", lambda names, seed: hashes)
    blocks, _ = directory.build(entries, 5, 2, 4096, (0, 0, 0, 0))
    leaves = [[entry[1] - 11 for entry in directory.parse_block(block)] for block in blocks[1:]]
    starts = np.frombuffer(blocks[0], "<u4", 2 * len(leaves), 32).reshape(-1, 2)[1:, 0].tolist()
    assert starts == [
        int(hashes[leaf[0]]) + int(hashes[leaf[0]] == hashes[before[-1]])
        for before, leaf in itertools.pairwise(leaves)
    ]
    assert 2001 in starts
    assert 1001 in starts


@pytest.mark.parametrize(("count", "fits"), [(15, True), (16, False)])
def test_a_block_is_filled_to_the_last_byte(count: int, fits: bool) -> None:
    # Entries of 256 bytes: 4096 bytes hold sixteen, or fifteen beside a larger one.
    entries = [(b"%03d" % number + b"n" * 245, number + 11, directory.FILE) for number in range(count + 1)]
    dots = directory.used_in([(b".", 5, 2), (b"..", 2, 2)])
    assert directory.used_in(entries) == 256 * (count + 1)
    blocks, is_tree = directory.build([(b"x" * (256 - dots - 8), 9, 1), *entries[:count]], 5, 2, 4096, (0, 0, 0, 0))
    assert (len(blocks), is_tree) == (1 if fits else 2, False)


def test_a_tree_may_have_one_leaf() -> None:
    # The kernel leaves such a tree when names are removed.
    entries = [(b"%03d" % number + b"n" * 200, number + 11, directory.FILE) for number in range(80)]
    blocks, _ = directory.build(entries, 5, 2, 4096, (0, 0, 0, 0))
    root = bytearray(blocks[0])
    root[34:36] = b"\1\0"
    assert directory.leaf_of([bytes(root), blocks[1]], 0xFFFFFFFC) == 1


@pytest.mark.parametrize(
    ("at", "change"), [(28, b"\2"), (30, b"\2"), (34, b"\0\0"), (34, b"\xff\xff"), (36, b"\0\0\0\0")]
)
def test_damaged_trees(at: int, change: bytes) -> None:
    entries = [(b"%03d" % number + b"n" * 200, number + 11, directory.FILE) for number in range(80)]
    blocks, _ = directory.build(entries, 5, 2, 4096, (0, 0, 0, 0))
    broken = bytearray(blocks[0])
    broken[at : at + len(change)] = change
    with pytest.raises(FormatError, match="directory tree"):
        directory.leaf_of([bytes(broken), *blocks[1:]], 0)


@pytest.mark.parametrize("damage", [(4, b"\0\0"), (4, b"\x07\0"), (4, b"\xff\xff"), (6, b"\xff")])
def test_damaged_blocks(damage: tuple[int, bytes]) -> None:
    at, change = damage
    block = bytearray(directory.pack_block([(b"abc", 12, 1), (b"def", 13, 1)], 4096))
    block[at : at + len(change)] = change
    with pytest.raises(FormatError, match="damaged directory"):
        directory.parse_block(bytes(block))
