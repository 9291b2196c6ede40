"""Indexes made here: equal to the original's, and of any gzip file whose content is then read at any place."""

from __future__ import annotations

import gzip
import io
import random
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.gzipindex import HEADER_SIZE, MIN_SPAN, WINDOW, IndexHeader, parse_table
from obdlab.layers.gzipwriter import GzipIndexWriter, SeveralMembersError, write_gzip_index
from tests.layers.golden import TURBO
from tests.layers.gzip_samples import content, index_of, member, target_of

KINDS = st.fixed_dictionaries(
    {
        "level": st.integers(0, 9),
        "strategy": st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED]),
        "flush": st.sampled_from([0, 0, 5_000, 70_000]),
        "library": st.sampled_from(["zlib", "isal"]),
    }
)


@pytest.mark.parametrize("name", ["l1", "l2", "l3", "good", "other"])
def test_an_index_is_the_originals_bit_by_bit(name: str) -> None:
    gz = (TURBO / f"{name}.tar.gz").read_bytes()
    index, found = index_of(gz)
    assert index == (TURBO / f"{name}.gzip.meta").read_bytes()
    assert found == gzip.decompress(gz)


@settings(max_examples=40, deadline=None)
@given(size=st.sampled_from([0, 1, 40_000, 300_000, 1_500_000]), seed=st.integers(0, 1 << 30), kind=KINDS)
def test_any_gzip_file_is_read_at_any_place(size: int, seed: int, kind: dict[str, object]) -> None:
    data = content(size, seed)
    gz = member(data, **kind)  # type: ignore[arg-type]
    index, found = index_of(gz, span=MIN_SPAN)
    assert found == data
    blob = target_of(gz, index)
    assert blob.size == size
    chooser = random.Random(seed)
    for _ in range(20):
        begin, end = sorted((chooser.randint(0, size), chooser.randint(0, size)))
        assert blob.read_at(begin, end - begin) == data[begin:end]
    assert sum(blob.verify()) == size


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 500, 70_000, 300_000]), min_size=2, max_size=12),
    seed=st.integers(0, 1 << 30),
    kind=KINDS,
    padding=st.sampled_from([0, 0, 1, 511, 70_000]),
)
def test_any_number_of_members_is_read_at_any_place(
    sizes: list[int], seed: int, kind: dict[str, object], padding: int
) -> None:
    parts = [content(size, seed + number) for number, size in enumerate(sizes)]
    gz = b"".join(member(part, **kind) for part in parts) + bytes(padding)  # type: ignore[arg-type]
    data = b"".join(parts)
    index, found = index_of(gz, span=MIN_SPAN, several=True)
    assert found == data
    assert index[8] == 2, "the original must refuse it"
    blob = target_of(gz, index)
    chooser = random.Random(seed)
    for _ in range(20):
        begin, end = sorted((chooser.randint(0, len(data)), chooser.randint(0, len(data))))
        assert blob.read_at(begin, end - begin) == data[begin:end]
    assert sum(blob.verify()) == len(data)
    with pytest.raises(SeveralMembersError, match=r"layer.tar.gz: gzip file of several members"):
        index_of(gz)


def test_one_member_gets_the_originals_version_even_if_several_were_allowed() -> None:
    gz = (TURBO / "l3.tar.gz").read_bytes()
    assert index_of(gz, several=True)[0] == (TURBO / "l3.gzip.meta").read_bytes()
    assert index_of(gz + bytes(600), several=True)[0][8] == 1


def test_what_the_original_cuts_to_the_first_member_is_read_whole() -> None:
    gz = (TURBO / "twomember.tar.gz").read_bytes()
    tar = gzip.decompress((TURBO / "good.tar.gz").read_bytes())
    index, _ = index_of(gz, several=True)
    blob = target_of(gz, index)
    assert blob.read_at(0, blob.size) == tar
    assert blob.read_at(1642596 - 100, 200) == tar[1642596 - 100 :][:200]  # across the border


@pytest.mark.parametrize("cut", [1, 8, 9, 20])
def test_a_cut_last_member_is_found_by_reading_the_end(cut: int) -> None:
    gz = member(content(100_000)) + member(content(100_000, 2))
    index, data = index_of(gz, several=True)
    header = replace(IndexHeader.from_bytes(index, index_size=len(index)), compressed_size=len(gz) - cut)
    blob = target_of(gz[:-cut], header.to_bytes() + index[HEADER_SIZE:])
    with pytest.raises(CorruptBlobError, match=r"inside its trailer|goes on behind|less than the index"):
        blob.read_at(len(data) - 1, 1)


def test_the_entries_are_the_last_borders_before_multiples_of_the_span() -> None:
    data = content(3_000_000, 4)
    gz = member(data)
    index, _ = index_of(gz, span=MIN_SPAN)
    header = IndexHeader.from_bytes(index, index_size=len(index))
    table = parse_table(index[header.index_start :], header)
    assert header.span == MIN_SPAN
    assert table["content"][0] == 0
    assert table["stored"][0] == 10
    assert len(set((table["content"][1:] // MIN_SPAN).tolist())) == len(table) - 1, "no two in the same span"
    writer = GzipIndexWriter(io.BytesIO(), span=MIN_SPAN)
    for _ in writer.decompressed(io.BytesIO(gz)):
        pass
    ends = [*table["content"].tolist()[1:], len(data)]
    assert writer.longest_span == max(end - begin for begin, end in zip(table["content"].tolist(), ends, strict=True))


def test_a_border_at_a_multiple_of_the_span_is_an_entry_at_once() -> None:
    step = 2 * MIN_SPAN
    index, _ = index_of(member(bytes(3 * step + 100), flush=step), span=MIN_SPAN)
    header = IndexHeader.from_bytes(index, index_size=len(index))
    table = parse_table(index[header.index_start :], header)
    assert sorted(set(table["content"].tolist())) == [0, step, 2 * step, 3 * step]


def test_it_does_not_matter_how_the_file_is_read() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 1, 1013))

    gz = (TURBO / "good.tar.gz").read_bytes()
    for file in (Slow(gz), Slow(gz + bytes(5000))):
        sink = io.BytesIO()
        header = write_gzip_index(file, sink)
        assert sink.getvalue()[HEADER_SIZE:] == (TURBO / "good.gzip.meta").read_bytes()[HEADER_SIZE:]
        assert header.compressed_size == len(file.getvalue())
    two = Slow(gz + gz)
    with pytest.raises(SeveralMembersError):
        write_gzip_index(two, io.BytesIO())


def test_one_giant_block_has_one_entry() -> None:
    data = bytes(3_000_000)
    gz = member(data, strategy=zlib.Z_FIXED)
    sink = io.BytesIO()
    writer = GzipIndexWriter(sink)
    assert b"".join(writer.decompressed(io.BytesIO(gz))) == data
    assert writer.header is not None
    assert writer.header.entries == 1
    assert writer.longest_span == 3_000_000
    assert target_of(gz, sink.getvalue()).read_at(2_999_000, 1000) == bytes(1000)


def test_it_is_written_from_the_current_position_on() -> None:
    sink = io.BytesIO()
    sink.write(b"before")
    header = write_gzip_index(io.BytesIO((TURBO / "l2.tar.gz").read_bytes()), sink)
    assert sink.tell() == 6 + header.index_size
    assert sink.getvalue() == b"before" + (TURBO / "l2.gzip.meta").read_bytes()


def test_an_index_that_was_not_finished_does_not_parse() -> None:
    sink = io.BytesIO()
    pieces = GzipIndexWriter(sink).decompressed(io.BytesIO((TURBO / "good.tar.gz").read_bytes()))
    next(pieces)
    pieces.close()
    data = sink.getvalue()
    assert len(data) > HEADER_SIZE
    with pytest.raises(FormatError, match="not a gzip index"):
        IndexHeader.from_bytes(data, index_size=len(data))


GZ = (TURBO / "l3.tar.gz").read_bytes()


@pytest.mark.parametrize("cut", [0, 1, 5, 10, 11, len(GZ) // 2, len(GZ) - 8, len(GZ) - 1])
def test_a_cut_file_is_refused(cut: int) -> None:
    with pytest.raises(FormatError, match=r"layer.tar.gz: gzip file ends early"):
        index_of(GZ[:cut])


@pytest.mark.parametrize("at", [3, 2000, len(GZ) // 2, len(GZ) - 8, len(GZ) - 1])
def test_a_damaged_file_is_refused(at: int) -> None:
    data = bytearray(GZ)
    data[at] ^= 0xE0
    with pytest.raises(CorruptBlobError, match=r"layer.tar.gz: gzip data does not inflate \(.+\) at offset \d+"):
        index_of(bytes(data))


@pytest.mark.parametrize("head", [b"\x78\x9c", b"PK\3\4", b"\x28\xb5\x2f\xfd"])
def test_other_formats_are_refused(head: bytes) -> None:
    with pytest.raises(FormatError, match="not a gzip file"):
        index_of(head + GZ)


@pytest.mark.parametrize("behind", [b"x", b"\0\0x", b"\x1f", bytes(300_000) + b"\x1f\x8b\x08"])
def test_other_bytes_behind_the_end_are_refused(behind: bytes) -> None:
    for several in (False, True):
        with pytest.raises(FormatError, match="neither a member nor zeros"):
            index_of(GZ + behind, several=several)


def test_a_cut_second_member_is_refused() -> None:
    for cut in (3, 100, len(GZ) - 1):
        with pytest.raises(FormatError, match="ends early"):
            index_of(GZ + GZ[:cut], several=True)


def test_spans_have_bounds() -> None:
    for span in (0, MIN_SPAN - 1, 1 << 31):
        with pytest.raises(ValueError, match="span of a gzip index"):
            GzipIndexWriter(io.BytesIO(), span=span)


def test_windows_are_the_content_before_their_entries() -> None:
    data = content(1_000_000, 9)
    index, _ = index_of(member(data), span=MIN_SPAN)
    header = IndexHeader.from_bytes(index, index_size=len(index))
    for row in parse_table(index[header.index_start :], header):
        window = zlib.decompress(index[row["window"] :][: row["length"]])
        assert window == (bytes(WINDOW) + data[: row["content"]])[-WINDOW:]
