"""Archives made to do harm: each ends in a clear error, or stays harmless; with bounded memory, disk and work."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import tarfile
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import zstandard

from obdlab.convert import apply as apply_module
from obdlab.convert.apply import ApplyError, apply_layer
from obdlab.convert.compare import listing as listing_module
from obdlab.convert.compare.listing import TreeEntry, list_volume
from obdlab.convert.decompress import decompressed
from obdlab.convert.tar.reader import TarStream
from obdlab.convert.tree import memorytree as memorytree_module
from obdlab.convert.tree.erofstree import ErofsTree
from obdlab.convert.tree.memorytree import MemoryTree
from obdlab.convert.tree.target import Ext4Tree
from obdlab.errors import FormatError
from obdlab.volumes.detect import open_volume
from obdlab.volumes.ext4.mkfs import make_filesystem
from obdlab.volumes.ext4.volume import Volume
from tests.convert.layouts import Member, directory, hardlink, member, symlink, tar_bytes
from tests.convert.torture import END, base256, gnu_long, padded, pax_header, pax_record, pax_sparse, raw_header
from tests.volumes.ext4.disk import FileDisk, fsck

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from obdlab.convert.tree.target import Tree
    from obdlab.volumes.erofs.editor import Directory

SIZE = 64 << 20


def applied(image: Path, *tars: bytes | io.RawIOBase) -> dict[str, TreeEntry]:
    """What the layers make of an empty file system of 64 MiB, which must be sound."""
    with FileDisk(image, SIZE) as disk:
        make_filesystem(disk)
        for tar in tars:
            tree = Ext4Tree(disk)
            apply_layer(io.BytesIO(tar) if isinstance(tar, bytes) else tar, "layer", tree)
            tree.finish()
        found = list_volume(Volume(disk))
    assert fsck(image) == ""
    return found


class Endless(io.RawIOBase):
    """A tar that is made while it is read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = bytearray()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while len(self._rest) < len(buffer) and (piece := next(self._pieces, b"")):
            self._rest += piece
        given = self._rest[: len(buffer)]
        del self._rest[: len(given)]
        buffer[: len(given)] = given
        return len(given)


@pytest.mark.parametrize("name", [".wh.", "./.wh.", "/.wh..", ".wh...", "d/.wh..", "d/../.wh.."])
def test_whiteout_of_the_root_or_a_parent(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="malformed whiteout"):
        applied(tmp_path / "disk", tar_bytes([directory("d/"), member(name)]))


@pytest.mark.parametrize("name", [".", "/", "./", "d/..", "//."])
def test_the_root_stays_what_it_is(name: str, tmp_path: Path) -> None:
    bad = [symlink(name, "/elsewhere"), member(name, b"no directory"), hardlink(name, "d/x")]
    for number, one in enumerate(bad):
        found = applied(tmp_path / str(number), tar_bytes([directory("d/"), member("d/x", b"1"), one, member("y")]))
        assert sorted(found) == [".", "d", "d/x", "y"]
        assert found["."].mode == 0o40755


def test_an_opaque_root_hides_only_what_is_below(tmp_path: Path) -> None:
    layers = [tar_bytes([member("old"), directory("d/")]), tar_bytes([member(".wh..wh..opq"), member("new")])]
    assert sorted(applied(tmp_path / "disk", *layers)) == [".", "new"]


@pytest.mark.parametrize("through", ["/etc", "../../../../../etc", "/proc/self/root/etc", "l"])
def test_writing_through_links(through: str, tmp_path: Path) -> None:
    # A layer's own link, one from a layer below, and to itself: all end inside.
    first = [
        symlink("l", through),
        member("l/passwd", b"pwned"),
        hardlink("l/shadow", "l/passwd"),
        member("l/.wh.hosts"),
    ]
    if through == "l":
        with pytest.raises(FormatError, match="Too many levels"):
            applied(tmp_path / "loop", tar_bytes(first))
        return
    found = applied(tmp_path / "disk", tar_bytes(first), tar_bytes([member("l/hostname", b"pwned")]))
    written = [path for path in found if path.endswith(("passwd", "shadow", "hostname"))]
    assert len(written) == 3
    with pytest.raises(FormatError, match="does not exist"):
        applied(tmp_path / "stolen", tar_bytes([symlink("l", through), hardlink("mine", "l/hostname")]))
    with pytest.raises(FormatError, match="does not exist"):
        applied(tmp_path / "absolute", tar_bytes([hardlink("mine", "/etc/hostname")]))


@pytest.mark.parametrize(
    ("tar", "what"),
    [
        (raw_header(b"lies", 1 << 30) + b"x" * 1024, "file system is full|ends inside a file"),
        (raw_header(b"lies", 1 << 20) + b"x" * 1024, "tar ends inside a file"),
        (raw_header(b"lies", 0, fields={124: base256(1 << 62, 12)}) + END, "File too large"),
        (raw_header(b"lies", 0, fields={124: base256(-512, 12)}) + END, "damaged"),
        (raw_header(b"lies", 0, fields={124: b"\xff" * 12}) + END, "negative"),
        (raw_header(b"lies", 0, fields={124: b"zzzzzzzzzzz\0"}) + END, "damaged"),
        (raw_header(b"lies", 600) + b"x" * 600, "the stream ends"),
        (pax_header(b"99999999999999999999 path=x\n") + raw_header(b"x", 0) + END, "damaged"),
        (pax_header(b"5 path=x\n") + raw_header(b"x", 0) + END, "damaged"),
        (pax_header(b"-1 path=x\n") + raw_header(b"x", 0) + END, "damaged"),
        (pax_header(pax_record("path", "x" * 500_000)) + raw_header(b"x", 0) + END, "name too long"),
        (pax_header(pax_record("size", "9" * 5000)) + raw_header(b"x", 0) + END, "size is"),
        (pax_header(pax_record("size", "-5")) + raw_header(b"x", 0) + END, "size is"),
        (gnu_long(b"L", b"a") + pax_header(b"5 path=x\n") + raw_header(b"x", 0) + END, "wrong length"),
        (raw_header(b"x", 4 << 30, b"x") + bytes(1 << 16), "at most 1048576"),
        (raw_header(b"x", 4 << 30, b"L") + bytes(1 << 16), "at most 1048576"),
        (pax_header(pax_record("path", "a\0b")) + raw_header(b"x", 0) + END, "NUL"),
        (pax_header(pax_record("linkpath", "a\0b")) + raw_header(b"x", 0, b"2") + END, "NUL"),
        (raw_header(b"socket", 0, b"s") + END, "unknown type"),
        (raw_header(b"l", 0, b"2", fields={157: bytes(100)}) + END, "No such file"),
    ],
)
def test_headers_that_lie(tar: bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises((FormatError, ApplyError)) as caught:
        applied(tmp_path / "disk", tar)
    assert any(part in str(caught.value).replace("File name", "name") for part in what.split("|")), caught.value
    # Nothing was made for what the header only claims.
    assert (tmp_path / "disk").stat().st_blocks * 512 < 8 << 20


def test_a_name_ends_at_its_first_nul(tmp_path: Path) -> None:
    tar = gnu_long(b"L", b"a\0/../../b") + raw_header(b"c", 0) + raw_header(b"d\0../e", 0) + END
    assert sorted(applied(tmp_path / "disk", tar)) == [".", "a", "d"]


@pytest.mark.parametrize(
    ("pieces", "size", "what"),
    [
        ([(0, b"x")], 1 << 60, "too large"),
        ([((1 << 50), b"x")], (1 << 50) + 1, "too large"),
        ([(0, b"x")], 1 << 44, "too large"),
        # GNU tar takes these, and the later piece wins; containerd refuses them.
        ([(0, b"x"), (0, b"y")], 4096, "out of order"),
        ([(0, b"x" * 600), (599, b"y")], 4096, "out of order"),
        ([(8192, b"x"), (0, b"y")], 16384, "out of order"),
    ],
)
def test_sparse_files_that_no_disk_holds(
    pieces: list[tuple[int, bytes]], size: int, what: str, tmp_path: Path
) -> None:
    tar = pax_sparse("1.0", "s", pieces, size) + END
    with pytest.raises(FormatError, match=what):
        applied(tmp_path / "disk", tar)


def test_adjacent_and_empty_pieces_of_a_sparse_file_are_in_order(tmp_path: Path) -> None:
    pieces = [(0, b"x" * 600), (600, b"y"), (0, b""), (4096, b"z"), (8192, b"")]
    found = applied(tmp_path / "disk", pax_sparse("1.0", "s", pieces, 8192) + END)
    tree = MemoryTree()
    plain = (b"x" * 600 + b"y").ljust(4096, b"\0") + b"z" + bytes(4095)
    apply_layer(io.BytesIO(tar_bytes([member("s", plain)])), "layer", tree)
    assert found["s"].sha256 == tree.listing()["s"].sha256


def test_files_that_take_too_long_to_hash_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorytree_module, "MOST_HASHED", 4 << 20)
    huge = pax_sparse("1.0", "s", [(0, b"x")], 1 << 60) + END
    together = b"".join(pax_sparse("1.0", f"s{number}", [(0, b"x")], 2 << 20) for number in range(3)) + END
    for tar in (huge, together):
        with pytest.raises(FormatError, match="File too large"):
            apply_layer(io.BytesIO(tar), "layer", MemoryTree())
        apply_layer(io.BytesIO(tar), "layer", MemoryTree(content=False))
    with FileDisk(tmp_path / "disk", SIZE) as disk:
        make_filesystem(disk)
        tree = Ext4Tree(disk)
        apply_layer(io.BytesIO(together), "layer", tree)
        tree.finish()
        assert len(list_volume(Volume(disk))) == 4
        monkeypatch.setattr(listing_module, "MOST_HASHED", 4 << 20)
        with pytest.raises(FormatError, match="too large to be compared"):
            list_volume(Volume(disk))
        assert len(list_volume(Volume(disk), content=False)) == 4


@pytest.mark.parametrize("kind", ["memory", "ext4", "erofs"])
def test_an_acl_that_is_larger_than_any_attribute(kind: str, tmp_path: Path) -> None:
    # Its cost would grow with the square of its size, which a header bounds at 1 MiB.
    acl = struct.pack("<I", 2) + struct.pack("<HHI", 2, 7, 1000) * 9000
    tar = tar_bytes([member("f", xattrs={"system.posix_acl_access": acl})])
    with FileDisk(tmp_path / "disk", SIZE) as disk:
        make_filesystem(disk)
        trees: dict[str, Callable[[], Tree]] = {
            "memory": MemoryTree, "ext4": lambda: Ext4Tree(disk), "erofs": lambda: ErofsTree(disk, fresh=True),
        }  # fmt: skip
        with pytest.raises(FormatError, match="Argument list too long"):
            apply_layer(io.BytesIO(tar), "layer", trees[kind]())


def test_a_sparse_file_of_many_crumbs_fills_the_image_only(tmp_path: Path) -> None:
    # Each byte of data takes a block of the image: 80 MB out of 300 KB.
    tar = pax_sparse("1.0", "s", [(8192 * number, b"x") for number in range(20_000)], 8192 * 20_000) + END
    with pytest.raises(ApplyError, match="file system is full"):
        applied(tmp_path / "disk", tar)


def test_zstd_that_wants_gigabytes_of_window() -> None:
    # A frame header (RFC 8878, 3.1.1.1) of a window of 2 GiB.
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + b"\x01\x00\x00"
    with pytest.raises(FormatError, match="damaged zstd data"):
        list(decompressed(io.BytesIO(frame), "layer"))


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_ratio_bombs_come_in_small_pieces(how: str) -> None:
    # 1 GiB of zeros, whose pieces are looked at one by one.
    if how == "zstd":
        chunk = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    else:
        packed = subprocess.run(["gzip", "-1"], input=bytes(64 << 20), capture_output=True, check=True)
        chunk = packed.stdout
    blob = chunk * 16
    assert len(blob) < 16 << 20
    total, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for piece in decompressed(io.BytesIO(blob), "layer"):
        assert len(piece) <= 4 << 20
        total += len(piece)
        if total > 300 << 20:
            break
    assert total > 300 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def flood(count: int, header: Callable[[int], bytes]) -> Endless:
    return Endless(header(number) for number in range(count))


def empty_file(number: int) -> bytes:
    return raw_header(b"d%d/%d" % (number // 1000, number), 0)


@pytest.mark.parametrize("count", [6_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_more_files_than_the_image_has_inodes(count: int, tmp_path: Path) -> None:
    with pytest.raises(ApplyError, match="file system is full"):
        applied(tmp_path / "disk", flood(count, empty_file))


@pytest.mark.parametrize("count", [3_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_stream_of_members_takes_no_memory(count: int) -> None:
    tracemalloc.start()
    try:
        assert sum(1 for _ in TarStream(flood(count, lambda _: MANY), "layer")) == count
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


MANY = raw_header(b"again", 0)


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_one_name_over_and_over(count: int, tmp_path: Path) -> None:
    assert sorted(applied(tmp_path / "disk", flood(count, lambda _: MANY))) == [".", "again"]


NAME_FLOODS: dict[str, Callable[[int], bytes]] = {
    "files": lambda number: raw_header(b"%d" % number, 0),
    "directories": lambda number: raw_header(b"%d" % number, 0, b"5"),
    "whiteouts": lambda number: raw_header(b".wh.%d" % number, 0),
    "whiteout devices": lambda number: raw_header(b"%d" % number, 0, b"3", fields={329: b"0\0", 337: b"0\0"}),
    "opaque marks": lambda number: raw_header(b"%d/.wh..wh..opq" % number, 0),
    "long paths": lambda number: gnu_long(b"L", b"%d/" % number + b"a/" * 2000 + b"f") + raw_header(b"x", 0),
}


@pytest.mark.parametrize("kind", NAME_FLOODS)
def test_memory_for_names_is_bounded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_module, "_MOST_HELD", 1 << 20)
    with pytest.raises(ApplyError, match="too many names in one layer"):
        applied(tmp_path / "disk", flood(3000, NAME_FLOODS[kind]))


class Counted(MemoryTree):
    """Counts how often names are looked at."""

    looked = 0

    def names(self, path: bytes) -> list[bytes]:
        found = super().names(path)
        self.looked += len(found) + 1
        return found


def test_replacing_costs_no_more_the_more_there_is() -> None:
    # A directory becomes a file and again a directory, beside thousands of others.
    turns: list[Member] = [directory("d") if number % 2 else member("d") for number in range(2000)]
    tree = Counted()
    apply_layer(io.BytesIO(tar_bytes([*(member(f"other/{n}") for n in range(2000)), *turns])), "layer", tree)
    assert tree.looked < 20_000


class Unlisted(dict[bytes, "Directory"]):
    """Directories by path, which are only looked up."""

    def __iter__(self) -> Iterator[bytes]:
        raise AssertionError("all directories were looked at")

    items = keys = values = __iter__  # type: ignore[assignment]


def test_replacing_in_an_erofs_looks_at_no_other_directory(tmp_path: Path) -> None:
    deep: list[Member] = [directory("d/"), directory("d/in/"), directory("d/in/deep/"), member("d/in/f")]
    turns = [each for _ in range(5) for each in (*deep, member("d"))]
    tar = tar_bytes([*(directory(f"other/{number}/") for number in range(100)), *turns, *deep[:2]])
    with FileDisk(tmp_path / "disk", SIZE) as disk:
        tree = ErofsTree(disk, fresh=True)
        tree._directories = Unlisted(tree._directories)
        apply_layer(io.BytesIO(tar), "layer", tree)
        assert tree.look(b"/d/in/deep") is None
        tree.finish()
        assert len(list_volume(open_volume(disk))) == 104


@pytest.mark.parametrize("count", [2000, 40_000])
def test_attributes_that_no_inode_holds(count: int, tmp_path: Path) -> None:
    body = b"".join(pax_record(f"SCHILY.xattr.user.{number}", "v") for number in range(count))
    with pytest.raises((FormatError, ApplyError), match=r"do not fit|at most 1048576"):
        applied(tmp_path / "disk", pax_header(body) + raw_header(b"f", 0) + END)


@pytest.mark.slow
def test_more_links_than_an_inode_counts(tmp_path: Path) -> None:
    def link(number: int) -> bytes:
        return raw_header(b"%d" % number, 0, b"1", fields={157: b"f"}) if number else raw_header(b"f", 0)

    with pytest.raises(FormatError, match="Too many links"):
        applied(tmp_path / "disk", flood(65_001, link))


def test_a_whole_conversion_of_a_flood_stays_small(tmp_path: Path) -> None:
    # In a process of its own, whose memory says what all of it took.
    (tmp_path / "tar").write_bytes(b"".join(map(empty_file, range(30_000))) + END)
    code = (
        "import resource, sys\n"
        "from tests.convert.test_malicious import applied\n"
        "from pathlib import Path\n"
        "from obdlab.convert.apply import ApplyError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: applied(Path(sys.argv[1]) / 'disk', open(Path(sys.argv[1]) / 'tar', 'rb', buffering=0))\n"
        "except ApplyError as error: assert 'full' in str(error)\n"
        "else: raise AssertionError('it fits')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48 << 10  # KiB


def test_padding_of_a_hostile_writer_is_not_content(tmp_path: Path) -> None:
    tar = raw_header(b"f", 3) + b"abc" + b"\xff" * 509 + raw_header(b"g", 0, b"0") + END + padded(b"after the end")
    found = applied(tmp_path / "disk", tar)
    assert sorted(found) == [".", "f", "g"]
    assert found["f"].size == 3


def test_unknown_header_kinds_carry_nothing_in(tmp_path: Path) -> None:
    info = tarfile.TarInfo("volume label")
    info.type = b"V"
    with pytest.raises(FormatError, match="unknown type"):
        applied(tmp_path / "disk", info.tobuf() + END)
