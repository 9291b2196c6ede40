"""ZFile reader and writer: golden files both ways, round trips, any range."""

from __future__ import annotations

import io
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import Blob, MemoryBlob
from obdlab.call import Call
from obdlab.errors import FormatError, OutOfRangeError
from obdlab.formats.checksum import raw_crc32c
from obdlab.formats.lsmt.layout import Flags as LsmtFlags
from obdlab.formats.lsmt.layout import Header, Trailer
from obdlab.formats.zfile.layout import BLOCK_CRC_SEED, ZFileHeader
from obdlab.layers import zfile_reader
from obdlab.layers.tarwrap import TarWrapWriter, open_tarwrap
from obdlab.layers.zfile import ZFileWriteError, ZFileWriter, open_zfile
from tests.layers.zfile_samples import ENTRIES, GOLDEN, compress, golden, quadratic, sha256

ALGORITHMS = {1: "lz4", 2: "zstd"}
layouts = pytest.mark.parametrize(
    ("algorithm", "block_size"), [(a, b << 10) for a in ("lz4", "zstd") for b in (4, 8, 16, 32, 64)]
)
entries = pytest.mark.parametrize("entry", ENTRIES, ids=[entry["file"] for entry in ENTRIES])


class CountingBlob(MemoryBlob):
    """Remembers what was read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: list[tuple[int, int]] = []
        self.closed = 0

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.reads.append((offset, length))
        return super().read_at(offset, length, call)

    def close(self) -> None:
        self.closed += 1


@entries
def test_golden_files_decode(entry: dict[str, Any]) -> None:
    with open_zfile(open_tarwrap(MemoryBlob(golden(entry["file"])))) as reader:
        assert reader.size == entry["decoded_size"]
        assert sha256(reader.read_at(0, reader.size)) == entry["decoded_sha256"]


@entries
def test_golden_files_are_written_byte_for_byte(entry: dict[str, Any]) -> None:
    data = golden(entry["file"])
    header = open_zfile(open_tarwrap(MemoryBlob(data))).header
    out = io.BytesIO()
    tar = TarWrapWriter(out) if ".tar." in entry["file"] else None
    with ZFileWriter(
        tar or out,
        header.block_size,
        ALGORITHMS[header.algorithm],
        header.is_overwritten,
        verify=header.verify,
    ) as writer:
        source = golden(entry["source"])
        for begin in range(0, len(source), 10_007):
            writer.write(source[begin : begin + 10_007])
    if tar:
        tar.close()
    assert sha256(out.getvalue()) == entry["sha256"]


@pytest.mark.parametrize("name", ["l1.lz4.lsmt", "l1.zstd16.lsmt", "l1.lz4tar.lsmt", "l2.lz4.lsmt"])
def test_golden_commits_are_written_byte_for_byte(name: str) -> None:
    data = (GOLDEN / "lsmt" / name).read_bytes()
    reader = open_zfile(open_tarwrap(MemoryBlob(data)))
    out = io.BytesIO()
    tar = TarWrapWriter(out) if "tar" in name else None
    with ZFileWriter(tar or out, reader.header.block_size, ALGORITHMS[reader.header.algorithm]) as writer:
        writer.write(reader.read_at(0, reader.size))
    if tar:
        tar.close()
    assert out.getvalue() == data


@pytest.mark.parametrize(
    ("algorithm", "size", "digest"),
    [
        ("lz4", 4186, "17f4839534efe1f6098075f048cee574609080f93462911aea882307197f2781"),
        ("zstd", 4182, "9972c0a777347d1e78d7ed7fa8ba3f2dfaf13700818eef000b1dc9cb173b3610"),
    ],
)
def test_published_vectors(algorithm: str, size: int, digest: str) -> None:
    source = quadratic(10_000)
    assert sha256(source) == "41fa892e8865ddbfb9f6fed370b4e2c094d082387a78e1fbec59c4d332b4c94d"
    data = compress(source, algorithm=algorithm, overwrite_header=False)
    assert (len(data), sha256(data)) == (size, digest)


def chunks(data: bytes, lengths: list[int]) -> Iterator[bytes]:
    begin = 0
    for length in lengths:
        yield data[begin : begin + length]
        begin += length
    yield data[begin:]


@layouts
@settings(max_examples=25, deadline=None)
@given(draw=st.data())
def test_round_trip(algorithm: str, block_size: int, draw: st.DataObject) -> None:
    seed = draw.draw(st.integers(0, 1 << 32))
    blocks = draw.draw(st.integers(0, 5))
    size = max(0, blocks * block_size + draw.draw(st.sampled_from([-1, 0, 1, 17, block_size // 2])))
    source = random.Random(seed)
    # Noise and text by turns, so that blocks compress differently, but none of 64 KiB is refused.
    data = b"".join(source.randbytes(10_000) + b"text " * 3000 for _ in range(size // 25_000 + 1))[:size]
    out = io.BytesIO()
    with ZFileWriter(out, block_size, algorithm, draw.draw(st.booleans()), verify=draw.draw(st.booleans())) as w:
        for chunk in chunks(data, draw.draw(st.lists(st.integers(0, 3 * block_size), max_size=4))):
            assert w.write(chunk) == len(chunk)
    assert w.original_size == size
    assert w.size == len(out.getvalue())
    reader = open_zfile(MemoryBlob(out.getvalue()))
    assert reader.size == size
    assert reader.read_at(0, size) == data
    for _ in range(10):
        begin = draw.draw(st.integers(0, size))
        end = draw.draw(st.integers(begin, min(size, begin + 3 * block_size)))
        assert reader.read_at(begin, end - begin) == data[begin:end]


@pytest.mark.parametrize("algorithm", ["lz4", "zstd"])
@pytest.mark.parametrize("block_size", [4096, 8192, 16384, 32768])
def test_noise_stays_within_the_limits_of_the_original_reader(algorithm: str, block_size: int) -> None:
    # Its read buffer holds 64 KiB, and its table 16-bit distances within that much content.
    source = os.urandom(65536 * 2)
    reader = open_zfile(MemoryBlob(compress(source, block_size, algorithm)))
    assert reader.read_at(0, reader.size) == source
    group = 65536 // block_size
    offsets = reader._table.boundaries(0, 2 * group)
    for first in (0, group):
        assert offsets[first + group - 1] - offsets[first] < 65535
        assert all(offsets[i + 1] - offsets[i] <= 65536 for i in range(first, first + group))


@pytest.mark.parametrize("algorithm", ["lz4", "zstd"])
def test_noise_in_64_kib_blocks_is_refused(algorithm: str) -> None:
    out = io.BytesIO()
    writer = ZFileWriter(out, 65536, algorithm)
    writer.write(bytes(65536))
    with pytest.raises(ZFileWriteError, match=r"block 1 does not compress .* use a block size of at most 32768"):
        writer.write(os.urandom(1 << 20))
    with pytest.raises(ZFileWriteError, match="failed before"):
        writer.write(b"more")
    with pytest.raises(ZFileWriteError, match="failed before"):
        writer.close()
    with pytest.raises(FormatError):
        open_zfile(MemoryBlob(out.getvalue()))


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["file"] for entry in ENTRIES])
def test_workers_write_the_same_bytes(entry: dict[str, Any], workers: int) -> None:
    header = open_zfile(open_tarwrap(MemoryBlob(golden(entry["file"])))).header
    source = golden(entry["source"])
    written = []
    for count in (1, workers):
        pipe = Pipe()
        with ZFileWriter(
            pipe, header.block_size, ALGORITHMS[header.algorithm], verify=header.verify, workers=count
        ) as writer:
            buffer = bytearray(100_003)
            for begin in range(0, len(source), len(buffer)):
                part = source[begin : begin + len(buffer)]
                buffer[: len(part)] = part
                writer.write(memoryview(buffer)[: len(part)])
                buffer[:] = bytes(len(buffer))  # the writer may keep nothing of it
        written.append(pipe.data)
    assert written[0] == written[1]


def test_a_higher_level_of_zstd_is_smaller_and_read_the_same() -> None:
    source = golden("text.bin")
    sizes = []
    for level in (3, 19):
        pipe = Pipe()
        with ZFileWriter(pipe, 32768, "zstd", level=level) as writer:
            writer.write(source)
        sizes.append(len(pipe.data))
        with open_zfile(MemoryBlob(bytes(pipe.data))) as reader:
            assert reader.read_at(0, reader.size) == source
    assert sizes[1] < sizes[0]


def write_noise(writer: ZFileWriter, failing: type[Exception] | None = None) -> None:
    with writer:
        for _ in range(20):
            writer.write(os.urandom(1 << 20))
        if failing is not None:
            raise failing


def test_workers_pass_errors_on_and_end() -> None:
    with pytest.raises(ZFileWriteError, match="does not compress"):
        write_noise(ZFileWriter(Pipe(), 65536, workers=4))
    with pytest.raises(ZeroDivisionError):
        write_noise(ZFileWriter(Pipe(), workers=4), failing=ZeroDivisionError)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("zfile-writer")] == []
    with pytest.raises(ZFileWriteError, match="got 0"):
        ZFileWriter(Pipe(), workers=0)


@pytest.mark.parametrize(("use_dict", "trained"), [(1, True), (1, False), (0, False)])
def test_dictionaries_are_read(use_dict: int, trained: bool) -> None:
    # Nobody writes them; by the layout one lies between header and blocks.
    source = golden("text.bin")
    parts = [source[begin : begin + 4096] for begin in range(0, len(source), 4096)]
    samples = [source[begin : begin + 500] for begin in range(0, len(source), 500)]
    content = zstandard.train_dictionary(8192, samples).as_bytes() if trained else source[100_000:130_000]
    dictionary = zstandard.ZstdCompressionDict(content) if use_dict else None
    blocks = [zstandard.ZstdCompressor(dict_data=dictionary).compress(part) for part in parts]
    stored = [block + raw_crc32c(block, BLOCK_CRC_SEED).to_bytes(4, "little") for block in blocks]
    index = b"".join(len(block).to_bytes(4, "little") for block in stored)
    header = ZFileHeader(
        flags=0x1B,
        algorithm=2,
        index_offset=512 + len(content) + sum(map(len, stored)),
        index_size=len(stored),
        original_size=len(source),
        index_crc=raw_crc32c(index),
        use_dict=use_dict,
        dict_size=len(content),
    )
    end = replace(header, flags=0x16)
    data = header.to_bytes() + content + b"".join(stored) + index + end.to_bytes()
    reader = open_zfile(MemoryBlob(data, "layer"))
    assert reader.read_at(0, len(source)) == source
    assert reader.read_at(50_000, 10) == source[50_000:50_010]
    lz4 = replace(header, algorithm=1).to_bytes() + data[512:]
    if use_dict:
        with pytest.raises(FormatError, match="layer: LZ4 blocks with a dictionary cannot be read"):
            open_zfile(MemoryBlob(lz4, "layer"))
        with pytest.raises(FormatError, match="layer: ZFile index lies outside the blob"):
            open_zfile(MemoryBlob(replace(header, dict_size=1 << 31).to_bytes() + data[512:], "layer"))


def test_runs_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = golden("input.bin")
    blob = CountingBlob(golden("input.lz4.4.zfile"))
    reader = open_zfile(blob)
    for limit in (1, 4096, 10_000, 1 << 20):
        monkeypatch.setattr(zfile_reader, "MAX_RUN", limit)
        blob.reads.clear()
        assert reader.read_at(1000, 700_000) == data[1000:701_000]
        assert all(length <= max(limit, 4118) for _, length in blob.reads)
        assert [a + b for a, b in blob.reads[:-1]] == [a for a, _ in blob.reads[1:]], "read once, in order"


def test_opening_reads_little() -> None:
    name = "text.lz4.4.ow.zfile"
    blob = CountingBlob(golden(name))
    reader = open_zfile(blob)
    index = (reader.header.index_offset, 4 * reader.header.index_size)
    assert blob.reads == [(0, 512), index], "an overwritten header spares the trailer"
    blob = CountingBlob(golden("text.lz4.4.zfile"))
    open_zfile(blob)
    assert blob.reads == [(0, 512), (blob.size - 512, 512), index]


def test_one_block_is_one_read_of_its_stored_bytes() -> None:
    blob = CountingBlob(golden("text.lz4.4.ow.zfile"))
    reader = open_zfile(blob)
    blob.reads.clear()
    reader.read_at(4096, 4096)
    begin, end = reader._table.boundaries(1, 2)
    assert blob.reads == [(begin, end - begin)]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (300_001, 1), (300_000, 2), (1 << 60, 1)])
def test_ranges_outside(offset: int, length: int) -> None:
    reader = open_zfile(MemoryBlob(golden("text.lz4.4.zfile"), "text"))
    with pytest.raises(OutOfRangeError, match="text: "):
        reader.read_at(offset, length)


def test_empty_reads() -> None:
    reader = open_zfile(MemoryBlob(golden("text.lz4.4.zfile")))
    assert reader.read_at(0, 0) == b""
    assert reader.read_at(300_001, 0) == b""
    assert open_zfile(MemoryBlob(golden("empty.lz4.4.zfile"))).read_at(0, 0) == b""


def test_close_reaches_the_blob_below() -> None:
    blob = CountingBlob(golden("one.lz4.4.zfile"))
    with open_zfile(blob):
        pass
    assert blob.closed == 1


def test_evict_is_passed_down_in_stored_bytes() -> None:
    class Evicting(MemoryBlob):
        evicted: tuple[int, int] | None = None

        def evict(self, offset: int, length: int) -> None:
            self.evicted = (offset, length)

    blob = Evicting(golden("text.lz4.4.zfile"))
    reader = open_zfile(blob)
    reader.evict(5000, 4096)
    begin, _, end = reader._table.boundaries(1, 3)
    assert blob.evicted == (begin, end - begin)
    blob.evicted = None
    reader.evict(5000, 0)
    assert blob.evicted is None


@pytest.mark.parametrize("algorithm", ["lz4", "zstd"])
def test_many_threads_read_at_once(algorithm: str) -> None:
    data = golden("input.bin")
    reader: Blob = open_zfile(MemoryBlob(compress(data, 16384, algorithm)))
    wrong: list[object] = []

    def read(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(200):
            begin = source.randrange(len(data))
            end = min(len(data), begin + source.randrange(60_000))
            try:
                if reader.read_at(begin, end - begin) != data[begin:end]:
                    wrong.append((begin, end))
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Pipe:
    """A sink that can only be written to."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


def test_a_sink_that_cannot_seek_keeps_its_first_header() -> None:
    pipe = Pipe()
    with ZFileWriter(pipe) as writer:
        writer.write(golden("text.bin"))
    assert pipe.data == golden("text.lz4.4.zfile")


def test_a_file_within_a_file() -> None:
    out = io.BytesIO(b"before")
    out.seek(6)
    with ZFileWriter(out) as writer:
        writer.write(golden("text.bin"))
    out.write(b"after")
    assert out.getvalue() == b"before" + golden("text.lz4.4.ow.zfile") + b"after"


def test_an_exception_leaves_no_readable_file() -> None:
    out = io.BytesIO()
    writer = ZFileWriter(out)
    writer.write(bytes(100_000))
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    with pytest.raises(FormatError):
        open_zfile(MemoryBlob(out.getvalue()))


def test_a_writer_is_closed_once() -> None:
    writer = ZFileWriter(io.BytesIO())
    writer.close()
    with pytest.raises(ZFileWriteError):
        writer.close()
    with pytest.raises(ZFileWriteError):
        writer.write(b"x")


@pytest.mark.parametrize("block_size", [0, 1, 512, 2048, 4095, 5000, 131072, -4096])
def test_block_sizes_that_the_original_refuses(block_size: int) -> None:
    with pytest.raises(ZFileWriteError, match=f"got {block_size}"):
        ZFileWriter(io.BytesIO(), block_size)


def empty_commit() -> bytes:
    """An empty 1 GiB layer, committed plain by the original's tool."""
    common = {"virtual_size": 1 << 30, "uuid": "ABCDEF01-2345-6789-ABCD-EF0123456789"}
    header = Header(flags=LsmtFlags.HEADER | LsmtFlags.DATA | LsmtFlags.SEALED, **common)
    trailer = Trailer(flags=LsmtFlags.DATA | LsmtFlags.SEALED, index_offset=4096, **common)
    return header.to_bytes() + trailer.to_bytes()


@pytest.mark.parametrize(
    ("wrapped", "block_size", "algorithm", "size", "digest"),
    [
        (False, 4096, "lz4", 1286, "11e5f59494a403dda31b05fd6c2c0755798f6ec3f944a39cbb97d85cec037e81"),
        (True, 4096, "lz4", 4096, "11a709d73ddc6c697d09b7f72efb26c4f0950e51681258f27ab92a03b008f199"),
        (False, 65536, "zstd", 1144, "a731cc0de447da1aff4c6a758bd56e1d70e884755d4604e478b53ffca95fecfc"),
    ],
)
def test_published_vectors_of_an_empty_commit(
    wrapped: bool, block_size: int, algorithm: str, size: int, digest: str
) -> None:
    plain = empty_commit()
    assert sha256(plain) == "6d33f9159461bdfc586921d70528d8b3edc01d2434e57a681c5a19f76b37b11e"
    out = io.BytesIO()
    tar = TarWrapWriter(out) if wrapped else None
    with ZFileWriter(tar or out, block_size, algorithm) as writer:
        writer.write(plain)
    if tar:
        tar.close()
    assert (len(out.getvalue()), sha256(out.getvalue())) == (size, digest)


@pytest.mark.parametrize("verify", [True, False])
def test_blobs_older_than_the_digest(verify: bool) -> None:
    # Unused flag bits, digest and the header's index fields are whatever lay on the writer's stack then.
    source = golden("text.bin")
    data = bytearray(compress(source, overwrite_header=False, verify=verify))
    header, trailer = ZFileHeader.from_bytes(bytes(data[:512])), ZFileHeader.from_bytes(bytes(data[-512:]))
    garbage = {"index_offset": 0x7FFE12345678, "index_size": 1 << 63, "original_size": 77, "index_crc": 5}
    data[:512] = replace(header, flags=0x7FFEA4640B43, **garbage).to_bytes()
    data[-512:] = replace(trailer, flags=0x7FFEA4640B46, index_crc=0xDEAD).to_bytes()
    data[28:32] = data[-484:-480] = b"junk"
    reader = open_zfile(MemoryBlob(data))
    assert reader.read_at(0, reader.size) == source
