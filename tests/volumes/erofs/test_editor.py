"""Changing an EROFS in place, beside a model; fsck.erofs has the last word."""

from __future__ import annotations

import errno
import random
import stat
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import FormatError
from obdlab.volumes.erofs import pack
from obdlab.volumes.erofs.editor import Directory, Editor, File
from obdlab.volumes.erofs.pack import BLOCK, SLOT
from obdlab.volumes.erofs.volume import Volume
from tests.volumes.erofs.samples import CountingDisk, add_file
from tests.volumes.ext4.samples import MemoryDisk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLAIN: dict[str, Any] = {"mode": 0o100644, "uid": 0, "gid": 0, "mtime_ns": 0, "xattrs": []}
FOLDER: dict[str, Any] = PLAIN | {"mode": 0o40755}


def make_folder(editor: Editor, parent: Directory, name: bytes, **changed: Any) -> Directory:
    return editor.add_directory(parent, name, **FOLDER | changed)


def fsck(disk: MemoryDisk, path: Path) -> str:
    """Have fsck.erofs read everything; what it complains of, or an empty text."""
    path.write_bytes(disk.data)
    done = subprocess.run(["fsck.erofs", str(path)], capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


# Of each path: mode, uid, gid, time, attributes, and a file's content or a link's text; not of the root.
Model = dict[bytes, tuple[Any, ...]]


def model_of(disk: MemoryDisk) -> Model:
    volume = Volume(disk)
    found: Model = {}
    for path, _, inode in volume.walk():
        kind = stat.S_IFMT(inode.mode)
        body: object = None
        if kind == stat.S_IFREG:
            body = b"".join(volume.content(inode))
        elif kind == stat.S_IFLNK:
            body = volume.readlink(inode)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            body = inode.rdev
        if path:
            found[path[1:]] = (inode.mode, inode.uid, inode.gid, inode.mtime_ns, sorted(volume.xattrs(inode)), body)
    return found


def some_attributes(draw: random.Random, kind: int) -> dict[str, Any]:
    xattrs = (
        {b"user.%d" % draw.randrange(3): draw.randbytes(draw.choice([0, 5, 900, 2500]))} if draw.randrange(2) else {}
    )
    return {
        "mode": kind | draw.choice([0o644, 0o4755, 0o1777]),
        "uid": draw.choice([0, 1000, 70_000]),
        "gid": draw.choice([0, 5, 1 << 31]),
        "mtime_ns": draw.choice([0, -5, 1_700_000_000_123_456_789]),
        "xattrs": list(xattrs.items()),
    }


def change(draw: random.Random, editor: Editor, model: Model) -> None:
    """Add, link, change or remove something, in ``model`` as well."""

    def find(path: bytes) -> File | Directory:
        node: File | Directory = editor.root
        for name in path.split(b"/") if path else []:
            assert isinstance(node, Directory)
            node = editor.entries(node)[name]
        return node

    folders = [b"", *(path for path, known in model.items() if stat.S_ISDIR(known[0]))]
    above = draw.choice(folders)
    parent = find(above)
    assert isinstance(parent, Directory)
    name = b"n" * draw.choice([1, 20, 200]) + b"%d" % draw.randrange(1000)
    path = above + b"/" + name if above else name
    kind = draw.choice([stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
    what = draw.choice(["add", "add", "add", "set", "remove"]) if model else "add"
    if what == "add" and path not in model:
        attributes = some_attributes(draw, kind)
        body: object = None
        if kind == stat.S_IFDIR:
            editor.add_directory(parent, name, **attributes)
        else:
            content = draw.randbytes(draw.choice([1, 2048, 4096, 5000, 9000]))
            body = {stat.S_IFREG: content, stat.S_IFLNK: content[:4000], stat.S_IFCHR: (259, 70_001)}.get(kind)
            editor.add_file(
                parent, name, **attributes, size=len(content), pieces=[(0, content)], rdev=(259, 70_001),
                target=content[:4000],
            )  # fmt: skip
        values = (attributes[key] for key in ("mode", "uid", "gid", "mtime_ns", "xattrs"))
        model[path] = (*values, body)
        return
    victim = draw.choice(list(model))
    parent, node = find(victim.rpartition(b"/")[0]), find(victim)
    assert isinstance(parent, Directory)
    if what == "remove":
        editor.remove(parent, victim.rpartition(b"/")[2])
        for known in [known for known in model if known == victim or known.startswith(victim + b"/")]:
            del model[known]
    elif what == "set":
        attributes = some_attributes(draw, stat.S_IFMT(model[victim][0]))
        if isinstance(node, Directory):
            editor.set_directory(node, **attributes)
        else:
            editor.set_file(parent, node, **attributes)
        values = (attributes[key] for key in ("mode", "uid", "gid", "mtime_ns", "xattrs"))
        model[victim] = (*values, model[victim][5])


@settings(max_examples=25)
@given(st.integers(0, 1 << 32))
def test_against_a_model(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    disk, model = MemoryDisk(8 << 20), Model()
    for layer in range(draw.randint(1, 4)):
        editor = Editor(disk, fresh=layer == 0)
        for _ in range(draw.randint(1, 40)):
            change(draw, editor, model)
        editor.finish()
        assert model_of(disk) == model
        assert Volume(disk).inodes == len(model) + 1
    assert fsck(disk, tmp_path / "disk") == ""


def test_links_are_counted_and_moved_together(tmp_path: Path) -> None:
    disk = MemoryDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    folder = make_folder(editor, editor.root, b"folder")
    deep = make_folder(editor, folder, b"deep")
    file = add_file(editor, b"file", b"content" * 300)
    editor.link(folder, b"second", file)
    editor.link(deep, b"third", file)
    add_file(editor, b"other", b"1")
    editor.finish()
    assert [Volume(disk).inode(n).links for n in numbers(disk)] == [3, 3, 3]
    # More attributes than there is room for: the inode moves, and all three names follow, from wherever it starts.
    for number, place in enumerate([(), (b"folder",), (b"folder", b"deep")]):
        editor = Editor(disk, fresh=False)
        parent: Directory = editor.root
        for name in place:
            node = editor.entries(parent)[name]
            assert isinstance(node, Directory)
            parent = node
        (found,) = [
            node
            for node in editor.entries(parent).values()
            if isinstance(node, File) and node.number in numbers(disk)
        ]
        before = found.number
        editor.set_file(parent, found, **PLAIN | {"xattrs": [(b"user.a", b"v" * (900 + 100 * number))]})
        editor.finish()
        assert len(set(numbers(disk))) == 1
        assert numbers(disk)[0] != before
        volume = Volume(disk)
        assert volume.inode(numbers(disk)[0]).links == 3
        assert len(volume.xattrs(volume.inode(numbers(disk)[0]))[0][1]) == 900 + 100 * number
    editor = Editor(disk, fresh=False)
    editor.remove(editor.root, b"folder")
    editor.finish()
    assert Volume(disk).inode(numbers(disk)[0]).links == 1
    assert Volume(disk).inodes == 3
    assert fsck(disk, tmp_path / "disk") == ""


def numbers(disk: MemoryDisk) -> list[int]:
    volume = Volume(disk)
    return [number for path, number, _ in volume.walk() if path.endswith((b"file", b"second", b"third"))]


def test_directories_count_their_subdirectories() -> None:
    disk = MemoryDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    folder = make_folder(editor, editor.root, b"folder")
    for name in (b"a", b"b", b"c"):
        make_folder(editor, folder, name)
    editor.add_file(folder, b"file", **PLAIN)
    editor.finish()
    editor = Editor(disk, fresh=False)
    node = editor.entries(editor.root)[b"folder"]
    assert isinstance(node, Directory)
    editor.remove(node, b"b")
    editor.finish()
    volume = Volume(disk)
    assert {path: inode.links for path, _, inode in volume.walk()} == {
        b"": 3, b"/folder": 4, b"/folder/a": 2, b"/folder/c": 2, b"/folder/file": 1,
    }  # fmt: skip


def test_what_the_file_system_cannot_do() -> None:
    disk = MemoryDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    file = add_file(editor, b"file", b"")
    root = editor.root

    def link(target: bytes) -> File:
        return editor.add_file(root, b"l" * (len(target) or 1), **PLAIN | {"mode": 0o120777}, target=target)

    wrong: list[tuple[int, Callable[[], object]]] = [
        (errno.EEXIST, lambda: add_file(editor, b"file", b"")),
        (errno.EEXIST, lambda: make_folder(editor, root, b"file")),
        (errno.EEXIST, lambda: editor.link(root, b"file", file)),
        (errno.ENAMETOOLONG, lambda: add_file(editor, b"n" * 256, b"")),
        (errno.ENAMETOOLONG, lambda: link(b"t" * 4096)),
        (errno.EINVAL, lambda: link(b"")),
        (errno.ERANGE, lambda: add_file(editor, b"x", b"", xattrs=[(b"user." + b"n" * 256, b"")])),
        (errno.ERANGE, lambda: make_folder(editor, root, b"x", xattrs=[(b"user." + b"n" * 256, b"")])),
        (errno.E2BIG, lambda: editor.set_directory(root, **FOLDER | {"xattrs": [(b"user.a", bytes(1 << 16))]})),
        (errno.ENOSPC, lambda: add_file(editor, b"x", bytes(1 << 20))),
    ]
    for code, call in wrong:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == code
    add_file(editor, b"n" * 255, b"")
    editor.add_file(root, b"link", **PLAIN | {"mode": 0o120777}, target=b"t" * 4095)
    editor.finish()
    volume = Volume(disk)
    assert set(volume.entries(volume.root)) == {b"file", b"n" * 255, b"link"}
    assert volume.readlink(volume.inode(volume.lookup(b"link") or 0)) == b"t" * 4095
    assert volume.inode(volume.lookup(b"file") or 0).links == 1


def test_no_link_more_than_can_be_counted() -> None:
    disk = MemoryDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    number = add_file(editor, b"file", b"").number
    editor.finish()
    struct.pack_into("<I", disk.data, number * SLOT + 44, 0xFFFFFFFE)
    editor = Editor(disk, fresh=False)
    file = editor.entries(editor.root)[b"file"]
    assert isinstance(file, File)
    editor.link(editor.root, b"again", file)
    assert editor.inode(file).links == 0xFFFFFFFF
    with pytest.raises(OSError, match="Too many links"):
        editor.link(editor.root, b"once more", file)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("length", [1, 4015, 4016])
def test_attributes_of_the_root_have_the_rest_of_its_block(tmp_path: Path, fresh: bool, length: int) -> None:
    # It cannot move, since its number must fit into 16 bits: 4096 bytes less 64 of its inode, 17 beside the value.
    disk = MemoryDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    add_file(editor, b"file", b"content")
    if not fresh:
        editor.finish()
        editor = Editor(disk, fresh=False)
    editor.set_directory(editor.root, **FOLDER | {"xattrs": [(b"user.a", b"v" * length)]})
    if length > 4015:
        with pytest.raises(OSError, match="root directory's attributes") as caught:
            editor.finish()
        assert caught.value.errno == errno.ENOSPC
        return
    editor.finish()
    volume = Volume(disk)
    assert volume.xattrs(volume.inode(volume.root)) == [(b"user.a", b"v" * length)]
    assert b"".join(volume.content(volume.inode(volume.lookup(b"file") or 0))) == b"content"
    assert fsck(disk, tmp_path / "disk") == ""


def test_same_attributes_change_nothing() -> None:
    disk = CountingDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    folder = make_folder(editor, editor.root, b"folder", xattrs=[(b"user.b", b"2"), (b"user.a", b"1")])
    editor.add_file(folder, b"file", **PLAIN | {"xattrs": [(b"user.b", b"2"), (b"user.a", b"1")]})
    editor.finish()
    before = bytes(disk.data)
    editor = Editor(disk, fresh=False)
    node = editor.entries(editor.root)[b"folder"]
    assert isinstance(node, Directory)
    file = editor.entries(node)[b"file"]
    assert isinstance(file, File)
    xattrs = [(b"user.a", b"1"), (b"user.b", b"2")]
    editor.set_directory(node, **FOLDER | {"xattrs": xattrs})
    editor.set_file(node, file, **PLAIN | {"xattrs": xattrs})
    editor.finish()
    assert disk.data == before


def test_a_change_of_attributes_writes_one_block_and_the_superblock() -> None:
    disk = CountingDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    folder = make_folder(editor, editor.root, b"folder")
    editor.add_file(folder, b"file", **PLAIN)
    editor.finish()
    for number in range(2):
        editor = Editor(disk, fresh=False)
        node = editor.entries(editor.root)[b"folder"]
        assert isinstance(node, Directory)
        file = editor.entries(node)[b"file"]
        assert isinstance(file, File)
        disk.writes.clear()
        if number:
            editor.set_directory(node, **FOLDER | {"uid": 5})
        else:
            editor.set_file(node, file, **PLAIN | {"uid": 7})
        editor.finish()
        assert sorted(disk.writes)[1:] == [(file.number * SLOT // BLOCK * BLOCK, BLOCK)]
    volume = Volume(disk)
    assert [inode.uid for _, _, inode in volume.walk()] == [0, 5, 7]


@pytest.mark.parametrize("count", [15, 16, 17, 300])
def test_directories_of_all_sizes(tmp_path: Path, count: int) -> None:
    # 12 bytes and the name for each: fifteen of 255 bytes and a last one fill a block with the dots.
    names = [b"%03d" % number + b"n" * 252 for number in range(count - 1)]
    names.append(b"~" * (52 if count == 16 else 100))
    disk = MemoryDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    folder = make_folder(editor, editor.root, b"folder")
    for name in names:
        editor.add_file(folder, name, **PLAIN)
    editor.finish()
    volume = Volume(disk)
    inode = volume.inode(volume.lookup(b"folder") or 0)
    assert (inode.size == BLOCK) == (count == 16)
    assert inode.layout == (pack.INLINE if 0 < inode.size % BLOCK <= BLOCK - pack.INODE_SIZE else pack.PLAIN)
    assert set(volume.entries(volume.lookup(b"folder") or 0)) == set(names)
    assert fsck(disk, tmp_path / "disk") == ""


@pytest.mark.parametrize(("length", "moves"), [(100, False), (97, False), (143, False), (144, True)])
def test_a_directory_moves_only_for_attributes_without_room(length: int, moves: bool) -> None:
    # 12 bytes, then 4, 1 and the value, filled up to four; the 40 bytes of the entries behind them are free as well.
    disk = MemoryDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    made = make_folder(editor, editor.root, b"folder", xattrs=[(b"user.a", b"v" * 100)])
    editor.add_file(made, b"f", **PLAIN)
    editor.finish()
    before = Volume(disk).lookup(b"folder")
    editor = Editor(disk, fresh=False)
    folder = editor.entries(editor.root)[b"folder"]
    assert isinstance(folder, Directory)
    editor.set_directory(folder, **FOLDER | {"xattrs": [(b"user.a", b"w" * length)]})
    editor.finish()
    volume = Volume(disk)
    after = volume.lookup(b"folder") or 0
    assert (after != before) == moves
    assert volume.xattrs(volume.inode(after)) == [(b"user.a", b"w" * length)]
    assert list(volume.entries(after)) == [b"f"]


def test_what_is_no_link_or_directory() -> None:
    disk = MemoryDisk(1 << 20)
    editor = Editor(disk, fresh=True)
    add_file(editor, b"file", b"text")
    editor.add_file(editor.root, b"link", **PLAIN | {"mode": 0o120777}, target=b"target")
    editor.finish()
    volume = Volume(disk)
    file, link = volume.lookup(b"file") or 0, volume.lookup(b"link") or 0
    with pytest.raises(FormatError, match="no symbolic link"):
        volume.readlink(volume.inode(file))
    with pytest.raises(FormatError, match="no directory"):
        volume.entries(file)
    struct.pack_into("<Q", disk.data, link * SLOT + 8, BLOCK + 1)
    with pytest.raises(FormatError, match="no symbolic link"):
        volume.readlink(volume.inode(link))
    struct.pack_into("<Q", disk.data, volume.root * SLOT + 8, (256 << 20) + 1)
    with pytest.raises(FormatError, match="no directory"):
        volume.entries(volume.root)


def test_an_erofs_with_other_blocks_is_not_changed() -> None:
    disk = MemoryDisk(1 << 20)
    Editor(disk, fresh=True).finish()
    disk.data[pack.SUPER_OFFSET + 12] = 11
    with pytest.raises(FormatError, match="not made here"):
        Editor(disk, fresh=False)


def test_an_erofs_with_another_root_is_not_changed() -> None:
    disk = MemoryDisk(1 << 20)
    Editor(disk, fresh=True).finish()
    struct.pack_into("<H", disk.data, pack.SUPER_OFFSET + 14, 129)
    disk.data[BLOCK + SLOT : BLOCK + SLOT + 64] = disk.data[BLOCK : BLOCK + 64]
    with pytest.raises(FormatError, match="not made here"):
        Editor(disk, fresh=False)
