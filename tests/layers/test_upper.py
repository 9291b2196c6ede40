"""The sparse writable layer's file, and reading the original's append-mode layers."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import FormatError, ObdlabError, OutOfRangeError, SourceError
from obdlab.formats.lsmt.layout import Flags, Trailer
from obdlab.layers.append import AppendUpper
from obdlab.layers.stack import Stack
from obdlab.layers.upper import SparseUpper
from tests.layers.golden import LSMT, blob

DISK = 1 << 20
PARENT = "11111111-1111-4111-8111-111111111111"


def test_header_is_the_originals(tmp_path: Path) -> None:
    golden = bytearray(blob("c1.data").read_at(0, 4096))
    golden[28] = 0x13
    uuid = golden[56:92].decode()
    with SparseUpper.create(tmp_path / "u", 1 << 30, uuid=uuid.lower(), parent_uuid=PARENT) as upper:
        assert upper.data.read_at(0, 4096) == golden
        assert (upper.uuid, upper.parent_uuid, upper.virtual_size) == (uuid, PARENT, 1 << 30)
    status = (tmp_path / "u").stat()
    assert status.st_size == 4096 + (1 << 30)
    assert status.st_blocks * 512 <= 8192
    assert status.st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_uuid_is_made_up(tmp_path: Path) -> None:
    with SparseUpper.create(tmp_path / "a", DISK) as a, SparseUpper.create(tmp_path / "b", DISK, user_tag="t") as b:
        assert a.uuid != b.uuid
        assert a.uuid == a.uuid.upper()
        assert a.uuid[14] == "4"
        assert b.header.user_tag == b"t"
        assert a.parent_uuid == "00000000-0000-0000-0000-000000000000"


def test_written_data_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "u"
    with SparseUpper.create(path, DISK) as upper:
        upper.write_at(4096, memoryview(b"ab" * 4096))
        upper.write_at(DISK - 512, bytearray(b"z" * 512))
        upper.flush()
        assert upper.lookup(0, 2048) == [
            (0, 8, -32768, 0),
            (8, 16, 0, 16),
            (24, 2023, -32768, 0),
            (2047, 1, 0, 2055),
        ]
    with SparseUpper.open(path) as upper:
        assert upper.read_at(4096, 8192) == b"ab" * 4096
        # By the file system's blocks: the last 4 KiB are held as a whole now.
        assert upper.index.segments().rows() == [(8, 16, 16, False, 0), (2040, 8, 2048, False, 0)]
        assert upper.read_at(DISK - 1024, 1024) == bytes(512) + b"z" * 512


def test_discard_frees_space_and_forgets_whole_sectors(tmp_path: Path) -> None:
    path = tmp_path / "u"
    with SparseUpper.create(path, DISK) as upper:
        upper.write_at(0, b"x" * 65536)
        upper.flush()
        full = path.stat().st_blocks
        upper.discard(100, 40000)
        assert path.stat().st_blocks <= full - 64
        assert upper.read_at(0, 65536) == b"x" * 100 + bytes(40000) + b"x" * (65536 - 40100)
        assert [run[:2] for run in upper.lookup(0, 128) if run[2] >= 0] == [(0, 1), (78, 50)]
        upper.discard(5, 0)


def test_ranges_outside_are_refused(tmp_path: Path) -> None:
    with SparseUpper.create(tmp_path / "u", DISK) as upper:
        for call in (
            lambda: upper.write_at(-1, b"x"),
            lambda: upper.read_at(DISK - 1, 2),
            lambda: upper.discard(0, DISK + 1),
        ):
            with pytest.raises(OutOfRangeError, match=r"u: range outside the disk"):
                call()
        with pytest.raises(OutOfRangeError, match="cannot shrink"):
            upper.set_virtual_size(DISK - 512)
        for size in (DISK + 1, 1 << 60):
            with pytest.raises(OutOfRangeError, match="virtual size"):
                upper.set_virtual_size(size)
        upper.set_virtual_size(2 * DISK)
        upper.write_at(DISK, b"more")
    with SparseUpper.open(tmp_path / "u") as upper:
        assert upper.virtual_size == 2 * DISK
        assert upper.read_at(DISK, 4) == b"more"


def test_create_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"mine")
    with pytest.raises(SourceError, match="there: opening failed: File exists"):
        SparseUpper.create(tmp_path / "there", DISK)
    assert (tmp_path / "there").read_bytes() == b"mine"
    with pytest.raises(SourceError, match="No such file"):
        SparseUpper.create(tmp_path / "none" / "u", DISK)
    with pytest.raises(ValueError, match="not a UUID"):
        SparseUpper.create(tmp_path / "u", DISK, uuid="x")
    with pytest.raises(OutOfRangeError, match="virtual size"):
        SparseUpper.create(tmp_path / "u", 100)
    with pytest.raises(SourceError, match="resizing to"):
        SparseUpper.create(tmp_path / "u", 1 << 58)  # more than the file system can
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_file_system_that_does_not_know_holes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unsized = SparseUpper.create(tmp_path / "unsized", 0)

    def all_is_data(_descriptor: int, offset: int, whence: int) -> int:  # as file systems without SEEK_HOLE answer
        return offset if whence == os.SEEK_DATA else 4096 + DISK

    monkeypatch.setattr(os, "lseek", all_is_data)
    with pytest.raises(SourceError, match=r"sparse layer: it takes the hole \[4096, 1052672\) for data"):
        SparseUpper.create(tmp_path / "u", DISK)
    assert not (tmp_path / "u").exists()
    with pytest.raises(SourceError, match="cannot keep a sparse layer"):
        unsized.set_virtual_size(DISK)
    unsized.close()


def test_a_write_cut_short_by_a_full_file_is_known(tmp_path: Path) -> None:
    with SparseUpper.create(tmp_path / "u", DISK) as upper:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096 + 10 * 512, hard))
            with pytest.raises(SourceError, match=r"writing failed: File too large|writing at offset 9216") as caught:
                upper.write_at(4096, b"x" * 4096)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert caught.value.offset == 4096 + 10 * 512
        assert isinstance(caught.value.__cause__, OSError)
        assert [run[:2] for run in upper.lookup(0, 64) if run[2] >= 0] == [(8, 2)]
        assert upper.read_at(4096, 2048) == b"x" * 1024 + bytes(1024)


def test_other_files_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "u"
    with pytest.raises(SourceError, match="No such file"):
        SparseUpper.open(path)
    for name, message in (
        ("c1.data", r"another kind of writable layer at offset 28 \(got flags 0x3"),
        ("l1.plain.lsmt", "another kind of writable layer"),
        ("l1.lz4.lsmt", "wrong magic"),
        ("l1.ops", "wrong magic"),
    ):
        with pytest.raises(FormatError, match=message):
            SparseUpper.open(LSMT / name)
    SparseUpper.create(path, DISK).close()
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(FormatError, match=r"cut short \(got 1052671 bytes, wanted 1052672\)"):
        SparseUpper.open(path)
    path.write_bytes(raw[:100])
    with pytest.raises(FormatError, match="header is cut short"):
        SparseUpper.open(path)
    path.write_bytes(raw + bytes(512))  # a resize that was interrupted
    SparseUpper.open(path).close()
    trailer = Trailer(flags=Flags.DATA | Flags.SEALED | Flags.SPARSE, virtual_size=DISK, index_offset=len(raw))
    path.write_bytes(raw + trailer.to_bytes())
    with pytest.raises(FormatError, match="was sealed"):
        SparseUpper.open(path)


def test_files_do_not_stay_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    SparseUpper.create(tmp_path / "u", DISK).close()
    upper = SparseUpper.open(tmp_path / "u")
    upper.close()
    upper.close()
    with (tmp_path / "other").open("wb+") as other:  # gets the number that the layer had
        for call in (
            lambda: upper.write_at(0, b"x"),
            lambda: upper.read_at(0, 1),
            lambda: upper.discard(0, 512),
            upper.flush,
        ):
            with pytest.raises(SourceError, match="layer file is closed"):
                call()
        assert other.read() == b""
    for name in ("c1.data", "l1.ops"):
        with pytest.raises(FormatError):
            SparseUpper.open(LSMT / name)
        with pytest.raises(FormatError):
            AppendUpper.open(LSMT / "l1.data", LSMT / name)
    assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 389), st.sampled_from((0, 0xFF, 1, 0x80))), max_size=4), st.integers(0, 70000)
)
def test_damaged_headers_give_an_error_or_a_readable_layer(
    tmp_path: Path, damage: list[tuple[int, int]], size: int
) -> None:
    path = tmp_path / "u"
    path.unlink(missing_ok=True)
    SparseUpper.create(path, 65536).close()
    with path.open("rb+") as file:
        for at, value in damage:
            file.seek(at)
            file.write(bytes([value]))
        if size % 2:
            file.truncate(size)
    try:
        with Stack([SparseUpper.open(path)]) as stack:
            stack.read_at(0, min(stack.size, 1 << 20))
    except ObdlabError:
        pass
