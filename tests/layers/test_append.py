"""Append-mode layers: the original's files byte for byte, and what crashes and damage leave of them."""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import Buffer
from obdlab.errors import FormatError, ObdlabError, OutOfRangeError, SourceError
from obdlab.formats.lsmt.layout import Flags, Header, Segments, Trailer, encode_segments, filler_records
from obdlab.layers.append import AppendUpper
from obdlab.layers.indexlog import Dropped
from obdlab.layers.layerfile import LayerFile
from obdlab.layers.stack import Stack
from tests.layers.golden import LSMT, blob, entry, sha256_of


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_append_layers_read_as_the_originals(name: str) -> None:
    with AppendUpper.open(LSMT / f"{name}.data", LSMT / f"{name}.index", read_only=True) as upper:
        assert upper.uuid[0] == name[1]
        assert sha256_of(Stack([upper])) == entry(f"{name}.data")["decoded_sha256"]


def _append_layer(folder: Path, log: bytes, data_sectors: int = 8) -> AppendUpper:
    (folder / "data").write_bytes((LSMT / "c1.data").read_bytes() + b"d" * 512 * data_sectors)
    (folder / "index").write_bytes((LSMT / "c1.index").read_bytes() + log)
    return AppendUpper.open(folder / "data", folder / "index")


def _log(*rows: tuple[int, int, int, bool, int]) -> bytes:
    return encode_segments(Segments.from_rows(list(rows)))


def test_later_records_win_and_fillers_are_skipped(tmp_path: Path) -> None:
    log = _log((0, 4, 8, False, 0)) + filler_records(3) + _log((2, 4, 12, False, 5), (3, 1, 16, True, 0))
    with _append_layer(tmp_path, log) as upper:
        assert upper.index.segments().rows() == [
            (0, 2, 8, False, 0),
            (2, 1, 12, False, 0),
            (3, 1, 16, True, 0),
            (4, 2, 14, False, 0),
        ]


def test_what_a_crash_leaves_at_the_end_is_dropped(tmp_path: Path) -> None:
    log = _log((0, 4, 8, False, 0), (8, 4, 14, False, 0), (9, 4, 16, False, 0)) + b"torn"
    with _append_layer(tmp_path, log) as upper:
        assert upper.index.segments().rows() == [(0, 4, 8, False, 0)]
        assert upper.dropped == Dropped(records=2, log_bytes=4, data_bytes=0)
        assert (tmp_path / "index").stat().st_size == 4096 + 16


def test_what_was_dropped_does_not_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Two records without data; then data is written to the very place they point to.
    log = _log((0, 4, 8, False, 0), (100, 8, 16, False, 0), (200, 4, 24, False, 0)) + b"odd"
    with _append_layer(tmp_path, log, data_sectors=8) as upper:
        assert upper.dropped == Dropped(records=2, log_bytes=3)
        assert "data: left out what a crash left: 2 records without their data, 3 odd bytes in" in caplog.text
        upper.write_at(0, b"n" * 8192)
        upper.flush()
    with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
        assert not upper.dropped
        assert upper.read_at(100 * 512, 4096) == bytes(4096)
        assert upper.read_at(0, 8192) == b"n" * 8192


def test_odd_bytes_at_the_end_of_the_data(tmp_path: Path) -> None:
    log = _log((0, 4, 8, False, 0), (4, 8, 12, False, 0))
    with _append_layer(tmp_path, log, data_sectors=8) as upper:
        assert upper.dropped == Dropped(records=1)
    with (tmp_path / "data").open("ab") as file:
        file.write(b"torn")
    with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
        assert upper.dropped == Dropped(data_bytes=4)
        upper.write_at(8192, b"n" * 512)
    assert (tmp_path / "data").stat().st_size == 4096 + 9 * 512
    with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
        assert upper.read_at(8192, 512) == b"n" * 512


@pytest.mark.parametrize(("name", "size"), [("c0", 0), ("c1", 1 << 30)])
def test_created_files_are_the_originals(tmp_path: Path, name: str, size: int) -> None:
    header = Header.from_bytes((LSMT / f"{name}.data").read_bytes())
    AppendUpper.create(
        tmp_path / "d", tmp_path / "i", size, uuid=header.uuid.lower(), parent_uuid=header.parent_uuid
    ).close()
    assert (tmp_path / "d").read_bytes() == (LSMT / f"{name}.data").read_bytes()
    assert (tmp_path / "i").read_bytes() == (LSMT / f"{name}.index").read_bytes()


def content_of(seed: int, op: int, sectors: int) -> bytes:
    """What the golden layers' writes hold, by the rule in their manifest."""
    if op % 4 == 0:
        return bytes([op & 255]) * 512 * sectors
    out = []
    mask = (1 << 64) - 1
    for sector in range(sectors):
        state = (seed * 1000003 + op * 65537 + sector) & mask
        for _ in range(64):
            state = (state + 0x9E3779B97F4A7C15) & mask
            mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
            out.append((mixed ^ (mixed >> 31)).to_bytes(8, "little"))
    return b"".join(out)


@pytest.mark.parametrize(("name", "seed"), [("l1", 11), ("l2", 22)])
def test_the_same_operations_give_the_originals_files(tmp_path: Path, name: str, seed: int) -> None:
    header = Header.from_bytes((LSMT / f"{name}.data").read_bytes())
    data, index = tmp_path / "d", tmp_path / "i"
    with AppendUpper.create(
        data, index, header.virtual_size, uuid=header.uuid, parent_uuid=header.parent_uuid
    ) as upper:
        for line in (LSMT / f"{name}.ops").read_text().splitlines():
            kind, sector, sectors, op = line.split()
            if kind == "W":
                upper.write_at(int(sector) * 512, content_of(seed, int(op), int(sectors)))
            else:
                upper.discard(int(sector) * 512, int(sectors) * 512)
        assert data.read_bytes() == (LSMT / f"{name}.data").read_bytes()
        assert index.read_bytes() == (LSMT / f"{name}.index").read_bytes()
        upper.seal().close()
    golden = blob(f"{name}.sealed.lsmt").read_at(0, blob(f"{name}.sealed.lsmt").size)
    ours = data.read_bytes()
    trailer = Trailer.from_bytes(golden[-4096:])
    index_end = trailer.index_offset + 16 * trailer.index_size
    assert len(ours) == len(golden)
    assert ours[:index_end] == golden[:index_end]
    assert not any(ours[index_end:-4096])  # uninitialised memory in the original's
    assert ours[-4096:] == golden[-4096:]


def test_only_whole_sectors(tmp_path: Path) -> None:
    with AppendUpper.create(tmp_path / "d", tmp_path / "i", 1 << 20) as upper:
        for call in (
            lambda: upper.write_at(1, bytes(512)),
            lambda: upper.write_at(0, b"x"),
            lambda: upper.discard(0, 1),
        ):
            with pytest.raises(OutOfRangeError, match="no whole sectors"):
                call()


def test_long_writes_and_discards_are_cut_for_records(tmp_path: Path) -> None:
    disk = 20000 * 512
    with AppendUpper.create(tmp_path / "d", tmp_path / "i", disk) as upper:
        upper.write_at(0, b"a" * disk)
        assert [row[:3] for row in upper.index.segments().rows()] == [
            (0, 8192, 8),
            (8192, 8192, 8200),
            (16384, 3616, 16392),
        ]
        upper.discard(0, disk)
        assert [row[:4] for row in upper.index.segments().rows()] == [
            (0, 16383, 20008, True),
            (16383, 3617, 20008, True),
        ]
        assert upper.log_records == 5


def test_group_commit(tmp_path: Path) -> None:
    index = tmp_path / "i"
    with AppendUpper.create(tmp_path / "d", index, 1 << 20) as upper:
        upper.set_group_commit(4)
        for sector in range(5):
            upper.write_at(sector * 512, bytes([sector + 1]) * 512)
        assert index.stat().st_size == 4096 + 4 * 16
        upper.flush()
        assert index.stat().st_size == 4096 + 8 * 16
        assert index.read_bytes()[-48:] == filler_records(3)
        upper.flush()
        assert index.stat().st_size == 4096 + 8 * 16
        upper.write_at(0, b"x" * 512)
        upper.set_group_commit(0)
        upper.write_at(512, b"y" * 512)
        assert index.stat().st_size == 4096 + 13 * 16
        upper.set_group_commit(3)
        upper.write_at(1024, b"z" * 512)
        with pytest.raises(ValueError, match="cannot collect"):
            upper.set_group_commit(-1)
    assert index.stat().st_size == 4096 + 16 * 16
    with AppendUpper.open(tmp_path / "d", index) as upper:
        assert upper.read_at(0, 2560) == b"x" * 512 + b"y" * 512 + b"z" * 512 + b"\4" * 512 + b"\5" * 512
        assert not upper.dropped


def test_a_flush_stores_the_data_before_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AppendUpper.create(tmp_path / "d", tmp_path / "i", 1 << 20) as upper:
        upper.set_group_commit(8)
        upper.write_at(0, bytes(512))
        calls: list[str] = []
        for name in ("write_some", "sync"):
            real = getattr(LayerFile, name)

            def noted(file: LayerFile, *args: Any, _name: str = name, _real: Any = real) -> Any:
                calls.append(f"{_name} {Path(file.name).name}")
                return _real(file, *args)

            monkeypatch.setattr(LayerFile, name, noted)
        upper.flush()
        assert calls == ["write_some i", "sync d", "sync i"]


@pytest.mark.parametrize(("name", "room"), [("d", 8192 + 700), ("i", 4096 + 16 + 7)])
def test_a_write_that_fails_midway_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: int
) -> None:
    real = LayerFile.write_some

    def full(file: LayerFile, offset: int, data: Buffer) -> int:
        if Path(file.name).name == name:
            data = memoryview(data)[: max(0, room - offset)]
            if not len(data):
                raise SourceError("no space left", blob=file.name)
        return real(file, offset, data)

    with AppendUpper.create(tmp_path / "d", tmp_path / "i", 1 << 20) as upper:
        upper.write_at(0, b"a" * 4096)
        with monkeypatch.context() as patch:
            patch.setattr(LayerFile, "write_some", full)
            with pytest.raises(SourceError, match="no space left"):
                upper.write_at(2048, b"b" * 4096)
        assert upper.read_at(0, 8192) == b"a" * 4096 + bytes(4096)
        upper.write_at(4096, b"c" * 512)
        upper.flush()
    with AppendUpper.open(tmp_path / "d", tmp_path / "i") as upper:
        assert upper.dropped.records == upper.dropped.log_bytes == 0
        assert upper.read_at(0, 8192) == b"a" * 4096 + b"c" * 512 + bytes(3584)


def test_many_records_claimed_by_an_empty_file(tmp_path: Path) -> None:
    # 128 million records of zeros mean nothing, and must not be held in memory.
    AppendUpper.create(tmp_path / "d", tmp_path / "i", 1 << 20).close()
    os.truncate(tmp_path / "i", 4096 + (1 << 20) * 16)
    tracemalloc.start()
    try:
        with AppendUpper.open(tmp_path / "d", tmp_path / "i") as upper:
            assert len(upper.index) == 0
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    os.truncate(tmp_path / "i", 4096 + (128_000_001) * 16)
    with pytest.raises(FormatError, match="too many records"):
        AppendUpper.open(tmp_path / "d", tmp_path / "i")


def test_a_guest_cannot_make_the_layer_look_sealed(tmp_path: Path) -> None:
    # It stores a trailer that fits the layer in everything, and comes to lie at the end of the data file.
    with AppendUpper.create(tmp_path / "d", tmp_path / "i", 1 << 20) as upper:
        trailer = Trailer(flags=Flags.DATA | Flags.SEALED, virtual_size=0, index_offset=4096, uuid=upper.uuid)
        upper.write_at(0, trailer.to_bytes())
    with AppendUpper.open(tmp_path / "d", tmp_path / "i") as upper:
        upper.write_at(8192, b"x" * 512)


def test_a_bad_record_elsewhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"index: LSMT index record 0 points outside .*got sectors \[14, 18\)"):
        _append_layer(tmp_path, _log((0, 4, 14, False, 0), (0, 4, 8, False, 0)))


def test_a_data_file_is_no_index() -> None:
    with pytest.raises(FormatError, match=r"not the index of a writable layer \(got flags 0x3, index at 0"):
        AppendUpper.open(LSMT / "c1.data", LSMT / "c1.data")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_damaged_files_give_an_error_or_a_readable_layer(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for name in ("data", "index"):
        content = bytearray((LSMT / f"l1.{name}").read_bytes())
        for _ in range(rng.randint(0, 4)):
            content[rng.choice((rng.randrange(390), 4096 + rng.randrange(960)))] = rng.choice((0, 0xFF, 1, 0x80))
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        (tmp_path / name).write_bytes(content)
    try:
        with Stack([AppendUpper.open(tmp_path / "data", tmp_path / "index")]) as stack:
            stack.read_at(0, min(stack.size, 1 << 20))
    except ObdlabError:
        pass
