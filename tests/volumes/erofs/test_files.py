"""Content of files in an EROFS that grows: written, read back, and freed."""

from __future__ import annotations

import errno
import random
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.volumes.erofs import pack
from obdlab.volumes.erofs.editor import Editor, File
from obdlab.volumes.erofs.files import FileWriter, chunk_count
from obdlab.volumes.erofs.freespace import Space
from obdlab.volumes.erofs.pack import BLOCK
from obdlab.volumes.erofs.volume import Volume
from tests.volumes.erofs.samples import CountingDisk, add_file

SIZES = [0, 1, 2047, 2048, 2049, 4032, 4095, 4096, 4097, 6144, 6145, 8191, 8192, 8193, 12_300]


def in_pieces(content: bytes, draw: random.Random) -> list[tuple[int, bytes]]:
    """The content as pieces of random lengths, the parts that are all zeros left out at random."""
    pieces = []
    at = 0
    while at < len(content):
        count = draw.choice([1, 100, 4000, 4096, 5000, 70_000])
        pieces.append((at, content[at : at + count]))
        at += count
    return pieces


@settings(max_examples=40)
@given(st.lists(st.sampled_from(SIZES), min_size=1, max_size=8), st.integers(0, 1 << 32))
def test_files_side_by_side_come_back(sizes: list[int], seed: int) -> None:
    draw = random.Random(seed)
    disk = CountingDisk(4 << 20)
    editor = Editor(disk, fresh=True)
    contents = [draw.randbytes(size) for size in sizes]
    for number, content in enumerate(contents):
        xattrs = [(b"user.large", draw.randbytes(draw.choice([1, 1500, 3000])))] if draw.random() < 0.3 else []
        add_file(editor, b"%d" % number, content, pieces=in_pieces(content, draw), xattrs=xattrs)
    editor.finish()
    volume = Volume(disk)
    found = volume.entries(volume.root)
    for number, content in enumerate(contents):
        inode = volume.inode(found[b"%d" % number][0])
        assert b"".join(volume.content(inode)) == content
        assert inode.layout == (pack.INLINE if 0 < len(content) % BLOCK <= 2048 else pack.PLAIN) or volume.xattrs(
            inode
        )


@pytest.mark.parametrize(("size", "layout", "blocks"), [
    (0, pack.PLAIN, 0), (1, pack.INLINE, 0), (2048, pack.INLINE, 0), (2049, pack.PLAIN, 1), (4096, pack.PLAIN, 1),
    (4097, pack.INLINE, 1), (6144, pack.INLINE, 1), (6145, pack.PLAIN, 2),
])  # fmt: skip
def test_a_short_last_part_lies_with_the_inode(size: int, layout: int, blocks: int) -> None:
    space = Space(CountingDisk(1 << 20), 2)
    written = FileWriter(space).write(size, [(0, b"x" * size)], 2048, sparse=False)
    assert (written.layout, space.end - 2) == (layout, blocks)
    assert written.tail == b"x" * (size % BLOCK if layout == pack.INLINE else 0)


def test_small_files_are_written_in_one_piece() -> None:
    disk = CountingDisk(1 << 20)
    space = Space(disk, 2)
    writer = FileWriter(space)
    for _ in range(5):
        writer.write(3000, [(0, b"y" * 3000)], 2048, sparse=False)
    space.flush()
    assert disk.writes == [(2 * BLOCK, 5 * BLOCK)]
    assert disk.data[2 * BLOCK :][: 5 * BLOCK] == (b"y" * 3000 + bytes(1096)) * 5


def test_attributes_that_leave_the_tail_no_room_move_it_into_a_block() -> None:
    disk = CountingDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    content = b"a" * 4096 + b"c" * 8192 + b"b" * 1000
    file = add_file(editor, b"file", content)
    assert editor.inode(file).layout == pack.INLINE
    # 64 bytes of inode, 17 and the value of attributes, 1000 of the tail; attributes are filled up to four bytes.
    for length, layout in ((3015, pack.INLINE), (3016, pack.PLAIN)):
        change(editor, file, [(b"user.a", b"v" * length)])
        assert editor.inode(file).layout == layout
        assert b"".join(editor._volume.content(editor.inode(file))) == content
    editor.finish()
    volume = Volume(disk)
    inode = volume.inode(volume.entries(volume.root)[b"file"][0])
    assert b"".join(volume.content(inode)) == content


@pytest.mark.parametrize(("value", "layout"), [(100, pack.INLINE), (3015, pack.INLINE), (3016, pack.PLAIN)])
def test_attributes_leave_the_rest_of_the_block_to_the_tail(value: int, layout: int) -> None:
    editor = Editor(CountingDisk(1 << 20), fresh=True)
    file = add_file(editor, b"file", b"b" * 1000, xattrs=[(b"user.a", b"v" * value)])
    assert editor.inode(file).layout == layout
    assert b"".join(editor._volume.content(editor.inode(file))) == b"b" * 1000


def test_a_file_in_chunks_moves_with_its_table() -> None:
    disk = CountingDisk(4 << 20)
    editor = Editor(disk, fresh=True)
    size = (2 << 20) + 777
    file = add_file(editor, b"file", b"", size=size, pieces=[(0, b"low"), (size - 4, b"high")], sparse=True)
    before = file.number
    for _ in range(2):  # once in the layer that wrote it, once in the next
        change(editor, file, [(b"user.a", b"v" * 500)] if file.number == before else [(b"user.a", b"v" * 900)])
        editor.finish()
        editor = Editor(disk, fresh=False)
        found = editor.entries(editor.root)[b"file"]
        assert isinstance(found, File)
        assert found.number != before
        file = found
        content = b"".join(editor._volume.content(editor.inode(file)))
        assert (len(content), content[:3], content[-4:], content.count(0)) == (size, b"low", b"high", size - 7)


def test_a_file_without_content_and_a_node_without_a_number() -> None:
    editor = Editor(CountingDisk(1 << 20), fresh=True)
    values = {"uid": 0, "gid": 0, "mtime_ns": 0, "xattrs": ()}
    empty = editor.add_file(editor.root, b"empty", mode=0o100644, **values)  # type: ignore[arg-type]
    node = editor.add_file(editor.root, b"node", mode=0o20644, **values)  # type: ignore[arg-type]
    assert (editor.inode(empty).size, editor.inode(node).rdev) == (0, (0, 0))


def change(editor: Editor, file: File, xattrs: list[tuple[bytes, bytes]]) -> None:
    editor.set_file(editor.root, file, mode=0o100644, uid=0, gid=0, mtime_ns=0, xattrs=xattrs)


@settings(max_examples=25)
@given(st.lists(st.integers(0, (3 << 20) - 1), max_size=6), st.integers((1 << 20), 3 << 20))
def test_a_sparse_file_takes_chunks_where_there_are_bytes(places: list[int], size: int) -> None:
    disk = CountingDisk(8 << 20)
    editor = Editor(disk, fresh=True)
    before = editor._space.end
    pieces = [(at, b"%d" % at) for at in sorted({at // 100 * 100 for at in places}) if at + 100 < size]
    file = add_file(editor, b"sparse", b"", size=size, pieces=pieces, sparse=True)
    chunks = {at // (64 << 10) for begin, piece in pieces for at in (begin, begin + len(piece) - 1)}
    last = size // (64 << 10)
    data = sum(16 if chunk < last else -(-(size % (64 << 10)) // BLOCK) for chunk in chunks)
    assert editor._space.end - before == data + 8  # and a run of metadata
    assert chunk_count(editor.inode(file)) == -(-size // (64 << 10))
    editor.finish()
    volume = Volume(disk)
    assert volume.has_chunks
    inode = volume.inode(volume.entries(volume.root)[b"sparse"][0])
    assert inode.layout == pack.CHUNKED
    expected = bytearray(size)
    for at, piece in pieces:
        expected[at : at + len(piece)] = piece
    assert b"".join(volume.content(inode)) == expected


@pytest.mark.parametrize(("rest", "blocks"), [(1, 1), (4096, 1), (4097, 2), (65536, 16)])
def test_the_last_chunk_is_as_long_as_its_bytes(rest: int, blocks: int) -> None:
    space = Space(CountingDisk(4 << 20), 2)
    size = (1 << 20) + rest
    written = FileWriter(space).write(size, [(size - 1, b"x")], 2048, sparse=True)
    assert written.chunks == [pack.HOLE] * 16 + [2]
    assert space.end == 2 + blocks


def test_only_large_sparse_files_are_in_chunks() -> None:
    writer = FileWriter(Space(CountingDisk(4 << 20), 2))
    assert writer.write((1 << 20) - 1, [], 2048, sparse=True).layout == pack.PLAIN
    assert writer.write(1 << 20, [(0, bytes(1 << 20))], 2048, sparse=False).layout == pack.PLAIN
    assert not writer.chunks
    assert writer.write(1 << 20, [], 2048, sparse=True).layout == pack.CHUNKED
    assert writer.chunks


@pytest.mark.parametrize(("size", "bits"), [
    (1 << 20, 4), (1 << 30, 4), ((1 << 30) + 1, 5), (1 << 40, 14), ((1 << 57), 31),
])  # fmt: skip
def test_chunks_grow_with_the_file(size: int, bits: int) -> None:
    # 64 KiB, and larger where there would be more than 16,384 of them.
    written = FileWriter(Space(CountingDisk(1 << 20), 2)).write(size, [], 2048, sparse=True)
    assert written.start == bits
    assert written.chunks == [pack.HOLE] * -(-size // (BLOCK << bits))


def test_a_file_that_no_chunks_can_map() -> None:
    with pytest.raises(OSError, match="too large") as caught:
        FileWriter(Space(CountingDisk(1 << 20), 2)).write((1 << 57) + 1, [], 2048, sparse=True)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("size", SIZES)
def test_a_removed_file_of_this_layer_frees_its_blocks_and_no_others(size: int) -> None:
    disk = CountingDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    for name in (b"before", b"file", b"after"):
        add_file(editor, name, b"z" * 4096 if name != b"file" else b"f" * size)
    editor.remove(editor.root, b"file")
    tail = size % BLOCK if 0 < size % BLOCK <= 2048 else 0
    blocks = -(-(size - tail) // BLOCK)
    assert disk.discards == ([(11 * BLOCK, blocks * BLOCK)] if blocks else [])
    editor.finish()
    volume = Volume(disk)
    for name, (number, _) in volume.entries(volume.root).items():
        assert name in (b"before", b"after")
        assert b"".join(volume.content(volume.inode(number))) == b"z" * 4096


def test_a_removed_sparse_file_frees_its_chunks() -> None:
    disk = CountingDisk(4 << 20)
    editor = Editor(disk, fresh=True)
    size = (1 << 20) + 5000
    add_file(editor, b"file", b"", size=size, pieces=[(70_000, b"1"), (size - 1, b"2")], sparse=True)
    editor.remove(editor.root, b"file")
    assert sorted(length for _, length in disk.discards) == [2 * BLOCK, 64 << 10]
    assert not any(disk.data[2 * BLOCK : (2 + 16 + 2) * BLOCK])


def test_what_is_no_regular_file_frees_nothing() -> None:
    disk = CountingDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    for kind in (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFLNK, stat.S_IFSOCK):
        name = b"%d" % kind
        editor.add_file(
            editor.root, name, mode=kind | 0o644, uid=0, gid=0, mtime_ns=0, xattrs=[], rdev=(1, 3), target=b"t" * 4000
        )
        editor.remove(editor.root, name)
    assert disk.discards == []
