"""Trace files as the original writes and reads them, and its priority lists."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.errors import CorruptBlobError, FormatError
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.trace import HEADER_SIZE, MAX_LENGTH, MAX_SIZE, PriorityList, Trace, content_of_layer
from tests.layers.golden import GOLDEN

GOLDEN_TRACE = content_of_layer((GOLDEN / "image" / "acceleration-layer.tar").read_bytes())
READS = st.tuples(st.integers(0, 254), st.integers(0, 1 << 40), st.integers(1, MAX_LENGTH))


def test_what_the_original_recorded_is_read_and_written_bit_by_bit() -> None:
    trace = Trace.from_bytes(GOLDEN_TRACE)
    assert len(trace) == (len(GOLDEN_TRACE) - 24) // 24 == 142
    assert trace.reads()[:4] == [(0, 0, 4096), (1, 0, 4096), (2, 0, 4096), (0, 0x1C65000, 4096)]
    written = trace.to_bytes()
    assert written[:20] == GOLDEN_TRACE[:20]  # after that: padding of the header, in which the original left garbage
    assert written[24:] == GOLDEN_TRACE[24:]


@given(st.lists(READS, max_size=20))
def test_reads_come_back(reads: list[tuple[int, int, int]]) -> None:
    trace = Trace.from_bytes(Trace.from_reads(reads).to_bytes())
    assert trace.reads() == reads
    assert trace.size == sum(length for _, _, length in reads)


def test_the_layout_byte_by_byte() -> None:
    records = struct.pack("<c3xIQq", b"R", 3, 512, 4096)
    header = struct.pack("<IIQII", 0xC2EF1820, 0, 24, raw_crc32c(records), 0)
    assert Trace.from_reads([(3, 4096, 512)]).to_bytes() == header + records


def test_a_read_of_more_than_1_mib_becomes_several() -> None:
    assert Trace.from_reads([(1, 5, 2 * MAX_LENGTH + 1), (0, 9, 0)]).reads() == [
        (1, 5, MAX_LENGTH),
        (1, 5 + MAX_LENGTH, MAX_LENGTH),
        (1, 5 + 2 * MAX_LENGTH, 1),
    ]


@pytest.mark.parametrize(
    ("data", "error", "what"),
    [
        (b"", FormatError, "not a trace"),
        (GOLDEN_TRACE[:20], FormatError, "cut off"),
        (b"x" + GOLDEN_TRACE[1:], FormatError, "not a trace"),
        (GOLDEN_TRACE[:-1], FormatError, "another size"),
        (GOLDEN_TRACE + b"\0", FormatError, "another size"),
        (GOLDEN_TRACE[:25] + b"\0" + GOLDEN_TRACE[26:], CorruptBlobError, "checksum"),  # a byte of padding counts
        (GOLDEN_TRACE[:24].ljust(MAX_SIZE + 1, b"\0"), FormatError, "too large"),
    ],
)
def test_damage_is_found(data: bytes, error: type[FormatError], what: str) -> None:
    with pytest.raises(error, match=what):
        Trace.from_bytes(data, name="t")


@pytest.mark.parametrize(("data", "got"), [(b"", "nothing"), (b"ab", "6162"), (b"0123456", "30313233")])
def test_the_error_shows_how_the_file_begins(data: bytes, got: str) -> None:
    with pytest.raises(FormatError, match="not a trace") as caught:
        Trace.from_bytes(data)
    assert (caught.value.offset, caught.value.got, caught.value.wanted) == (0, got, "2018efc2")


def test_reads_of_another_image_are_found() -> None:
    trace = Trace.from_reads([(0, 0, 10), (1, 90, 10)])
    trace.check_fits([10, 100])
    for sizes in ([10], [9, 100], [10, 99]):
        with pytest.raises(FormatError, match="not of this image"):
            trace.check_fits(sizes)
    with pytest.raises(FormatError, match="not of this image"):
        Trace.from_reads([(0, -1, 1)]).check_fits([10])


def test_a_long_trace_is_checked_in_little_memory() -> None:
    trace = Trace.from_bytes(Trace.from_reads([(0, 1000, 2000)] * 100_000).to_bytes())
    tracemalloc.start()
    try:
        trace.check_fits([3000])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000


def test_an_acceleration_layer_that_is_none() -> None:
    tar = (GOLDEN / "image" / "acceleration-layer.tar").read_bytes()
    for data in (b"", tar[:600], b"\0" * 2048):
        with pytest.raises(FormatError):
            content_of_layer(data)
    assert len(GOLDEN_TRACE) == HEADER_SIZE + 142 * 24


@pytest.mark.parametrize("data", [b"/bin/sh\nwith blank\n", b"/usr/lib/\nwith blank\n", b"", b"\n"])
def test_a_list_may_have_odd_lines_beside_paths(data: bytes) -> None:
    listed, odd = PriorityList.from_bytes(data)
    assert len(odd) == data.count(b"with")
    assert len(listed.files) + len(listed.directories) == data.count(b"/bin/sh") + data.count(b"/usr/lib/")


def test_odd_lines_alone_are_no_list() -> None:
    with pytest.raises(FormatError, match="neither a trace nor a list") as caught:
        PriorityList.from_bytes(b"with blank\n")
    assert "line 1" in str(caught.value) or "not a plain path" in str(caught.value)


def test_a_priority_list() -> None:
    listed, odd = PriorityList.from_bytes(b"/bin/sh \n\n  etc/app.conf\n/usr/lib/\n/opt/x*\nwith blank\n\xff\n/a*b\n")
    assert listed.files == ("/bin/sh", "etc/app.conf")
    assert listed.directories == ("/usr/lib/", "/opt/x")
    assert [reason.split(":")[1] for reason in odd] == [" line 6", " line 7", " line 8"]
    assert PriorityList.from_bytes(b"/a\n" + b"\n" * 65533)[0].files == ("/a",)
    with pytest.raises(FormatError, match="too large"):
        PriorityList.from_bytes(b"/a\n" + b"\n" * 65534)
