"""Extended attributes in inodes and blocks: places, limits, hashes, and ACLs in both forms."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.volumes.ext4 import xattr

INLINE, BLOCK = 96, 4096
names = st.builds(
    lambda prefix, name: prefix + name,
    st.sampled_from([b"user.", b"trusted.", b"security."]),
    st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name),
)


@given(st.dictionaries(names, st.binary(max_size=400), max_size=5))
def test_attributes_come_back_from_inode_and_block(pairs: dict[bytes, bytes]) -> None:
    inode, block = xattr.place(list(pairs.items()), inline_space=INLINE, block_size=BLOCK)
    assert len(inode) in (0, INLINE)
    assert len(block) in (0, BLOCK)
    found = (xattr.parse_inline(inode) if inode else []) + (xattr.parse_block(block) if block else [])
    assert len(found) == len(pairs)
    assert dict(found) == pairs
    # The kernel searches them in this order.
    for where in (xattr.parse_inline(inode), xattr.parse_block(block) if block else []):
        order = [(split[0], len(split[1]), split[1]) for name, _ in where if (split := xattr.split_name(name))]
        assert order == sorted(order)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (b"user.a", (1, b"a")), (b"user.", None), (b"trusted.x", (4, b"x")), (b"security.selinux", (6, b"selinux")),
        (b"system.posix_acl_access", (2, b"")), (b"system.posix_acl_default", (3, b"")),
        (b"system.posix_acl_access.more", None), (b"system.other", None), (b"odd", None), (b"", None),
    ],
)  # fmt: skip
def test_names(name: bytes, wanted: tuple[int, bytes] | None) -> None:
    assert xattr.split_name(name) == wanted


@pytest.mark.parametrize(("length", "inside"), [(68, True), (69, False)])
def test_an_inode_is_filled_to_the_last_byte(length: int, inside: bool) -> None:
    # 96 bytes: 4 of magic, 4 of zeros at the end of the list, 16 and 4 of the entry.
    pairs = [(b"user.abcd", b"v" * length)]
    inode, block = xattr.place(pairs, inline_space=INLINE, block_size=BLOCK)
    assert (bool(inode), bool(block)) == (inside, not inside)


@pytest.mark.parametrize(("length", "fits"), [(4096 - 32 - 4 - 20, True), (4096 - 32 - 4 - 20 + 1, False)])
def test_a_block_is_filled_to_the_last_byte(length: int, fits: bool) -> None:
    pairs = [(b"user.abcd", b"v" * length)]
    if fits:
        assert xattr.parse_block(xattr.place(pairs, inline_space=INLINE, block_size=BLOCK)[1]) == pairs
        return
    with pytest.raises(OSError, match="do not fit") as caught:
        xattr.place(pairs, inline_space=INLINE, block_size=BLOCK)
    assert caught.value.errno == errno.E2BIG


def test_small_attributes_go_into_the_inode_beside_large_ones_in_the_block() -> None:
    pairs = [(b"user.large", b"l" * 100), (b"user.s", b"s")]
    inode, block = xattr.place(pairs, inline_space=INLINE, block_size=BLOCK)
    assert xattr.parse_inline(inode) == pairs[1:]
    assert xattr.parse_block(block) == pairs[:1]


def test_hashes_are_those_of_the_kernel() -> None:
    # fs/ext4/xattr.c: ext4_xattr_hash_entry() and ext4_xattr_rehash(), by hand for two entries.
    pairs = [(b"user.ab", b"x" * 200), (b"user.abc", b"y" * 201)]
    _, block = xattr.place(pairs, inline_space=INLINE, block_size=BLOCK)
    magic, users, blocks, digest = struct.unpack_from("<4I", block)
    assert (magic, users, blocks) == (0xEA020000, 1, 1)
    hashes = []
    for at, name, value in ((32, b"ab", b"x" * 200), (32 + 20, b"abc", b"y" * 201 + bytes(3))):
        wanted = 0
        for byte in name:
            wanted = ((wanted << 5) ^ (wanted >> 27) ^ byte) % (1 << 32)
        for word in struct.unpack(f"<{len(value) // 4}I", value):
            wanted = ((wanted << 16) ^ (wanted >> 16) ^ word) % (1 << 32)
        assert struct.unpack_from("<I", block, at + 12) == (wanted,)
        hashes.append(wanted)
    both = 0
    for each in hashes:
        both = ((both << 16) ^ (both >> 16) ^ each) % (1 << 32)
    assert digest == both


def test_an_entry_without_a_hash_leaves_the_block_without_one() -> None:
    # The kernel shares blocks of equal hashes, and never one of hash 0. This name and value hash to zero.
    word = struct.pack("<I", ((ord("a") << 16) ^ (ord("a") >> 16)) & 0xFFFFFFFF)
    pairs = [(b"user.a", word), (b"user.bb", b"b" * 100)]
    _, block = xattr.place(pairs, inline_space=12, block_size=BLOCK)
    assert struct.unpack_from("<I", block, 32 + 12) == (0,)
    assert struct.unpack_from("<I", block, 12) == (0,)
    assert xattr.parse_block(block) == pairs


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (0, "<I", 0xEA020001),  # magic
        (32, "<B", 255),  # a name past the block's end, for an entry at its end
        (32 + 2, "<H", 4095),  # value's offset
        (32 + 4, "<I", 5),  # value in an inode of its own
        (32 + 8, "<I", 5000),  # value's length
    ],
)
def test_damaged_blocks(at: int, form: str, value: int) -> None:
    _, block = xattr.place([(b"user.abcd", b"v" * 4000)], inline_space=INLINE, block_size=BLOCK)
    raw = bytearray(block[:60] + block[-4000:]) if form == "<B" else bytearray(block)
    struct.pack_into(form, raw, at, value)
    if form == "<B":
        del raw[200:]
    with pytest.raises(FormatError, match="extended attribute"):
        xattr.parse_block(raw)


def test_a_list_that_the_end_cuts_off() -> None:
    inode, _ = xattr.place([(b"user.abcd", b"")], inline_space=INLINE, block_size=BLOCK)
    assert xattr.parse_inline(inode[:24]) == [(b"user.abcd", b"")]
    with pytest.raises(FormatError, match="run over"):
        xattr.parse_inline(inode[:16])
    assert xattr.parse_inline(inode[:7]) == []
    assert xattr.parse_inline(bytes(96)) == xattr.parse_inline(b"\1" * 96) == []


def test_attributes_of_an_unknown_prefix_are_passed_over() -> None:
    inode, _ = xattr.place([(b"user.a", b"1"), (b"user.b", b"2")], inline_space=INLINE, block_size=BLOCK)
    raw = bytearray(inode)
    raw[4 + 1] = 9
    assert xattr.parse_inline(bytes(raw)) == [(b"user.b", b"2")]


NONE = 0xFFFFFFFF
Entry = tuple[int, int, int]


def acl(*entries: Entry, version: int = 2) -> bytes:
    """The form programs see: tag, permissions, number."""
    return struct.pack("<I", version) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


USER, GROUP, OTHER, MASK = (1, 6, NONE), (4, 4, NONE), (32, 4, NONE), (16, 7, NONE)
NAMED, NAMED_GROUP = (2, 7, 1000), (8, 5, 70_000)


@pytest.mark.parametrize(
    ("entries", "mode", "wanted"),
    [
        # The mode's bits win: the owner's, the mask's in place of the group's, the others'.
        ([USER, NAMED, GROUP, MASK, OTHER], 0o751,
         [(1, 7, NONE), (2, 7, 1000), (4, 4, NONE), (16, 5, NONE), (32, 1, NONE)]),
        ([OTHER, MASK, NAMED_GROUP, GROUP, USER], 0o640,
         [(1, 6, NONE), (4, 4, NONE), (8, 5, 70_000), (16, 4, NONE), (32, 0, NONE)]),
        ([USER, (2, 1, 9), (2, 2, 8), GROUP, MASK, OTHER], 0o777,
         [(1, 7, NONE), (2, 2, 8), (2, 1, 9), (4, 4, NONE), (16, 7, NONE), (32, 7, NONE)]),
        ([USER, GROUP, MASK, OTHER], 0o421, [(1, 4, NONE), (4, 4, NONE), (16, 2, NONE), (32, 1, NONE)]),
    ],
)  # fmt: skip
def test_an_acl_of_a_file(entries: list[Entry], mode: int, wanted: list[Entry]) -> None:
    stored = xattr.acl_to_disk(acl(*entries), mode, default=False)
    assert stored is not None
    assert xattr.acl_from_disk(stored) == acl(*wanted)
    assert len(stored) == 4 + sum(8 if entry[0] in (2, 8) else 4 for entry in wanted)


def test_an_acl_that_says_no_more_than_the_mode_is_left_out() -> None:
    assert xattr.acl_to_disk(acl(USER, GROUP, OTHER), 0o777, default=False) is None
    assert xattr.acl_to_disk(acl(), 0o777, default=True) is None


def test_a_default_acl_keeps_its_own_bits() -> None:
    stored = xattr.acl_to_disk(acl(USER, GROUP, OTHER), 0o777, default=True)
    assert stored is not None
    assert xattr.acl_from_disk(stored) == acl(USER, GROUP, OTHER)


@pytest.mark.parametrize(
    "bad",
    [
        b"", b"\2\0\0", acl(USER, GROUP, OTHER, version=1), acl(USER, GROUP, OTHER) + b"\0" * 4,
        acl(GROUP, OTHER), acl(USER, OTHER), acl(USER, GROUP), acl(USER, USER, GROUP, OTHER),
        acl(USER, GROUP, OTHER, NAMED), acl(USER, GROUP, OTHER, NAMED_GROUP), acl(USER, GROUP, OTHER, MASK, MASK),
        acl((1, 8, NONE), GROUP, OTHER, MASK), acl(USER, GROUP, OTHER, (64, 4, NONE)),
        acl(),
    ],
)  # fmt: skip
def test_malformed_acls(bad: bytes) -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        xattr.acl_to_disk(bad, 0o644, default=False)
    assert caught.value.errno == errno.EINVAL


def test_an_acl_is_no_larger_than_an_attribute_can_be() -> None:
    entries = [USER, GROUP, MASK, OTHER, *((2, 7, number) for number in range(8187))]
    stored = xattr.acl_to_disk(acl(*entries), 0o644, default=False)
    assert stored is not None
    with pytest.raises(OSError, match="Argument list too long") as caught:
        xattr.acl_to_disk(acl(*entries, NAMED), 0o644, default=False)
    assert caught.value.errno == errno.E2BIG


@pytest.mark.parametrize(
    "bad", [b"", b"\1\0\0", struct.pack("<I", 2), struct.pack("<IHH", 1, 2, 7), struct.pack("<IHHH", 1, 8, 7, 1)]
)
def test_damaged_acls_on_disk(bad: bytes) -> None:
    with pytest.raises(FormatError, match="damaged ACL"):
        xattr.acl_from_disk(bad)
