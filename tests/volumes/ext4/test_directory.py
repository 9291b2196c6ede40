"""Names' hashes and trees, beside what e2fsprogs and the kernel make of them."""

from __future__ import annotations

import subprocess
import uuid
from typing import TYPE_CHECKING

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


@pytest.mark.parametrize("damage", [(4, b"\0\0"), (4, b"\x07\0"), (4, b"\xff\xff"), (6, b"\xff")])
def test_damaged_blocks(damage: tuple[int, bytes]) -> None:
    at, change = damage
    block = bytearray(directory.pack_block([(b"abc", 12, 1), (b"def", 13, 1)], 4096))
    block[at : at + len(change)] = change
    with pytest.raises(FormatError, match="damaged directory"):
        directory.parse_block(bytes(block))
