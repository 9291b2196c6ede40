"""Committed layers are the original's byte for byte, and read as what they were made of."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.call import Call
from obdlab.errors import FormatError, SourceError
from obdlab.formats.lsmt.layout import decode_segments
from obdlab.layers import commit as commit_module
from obdlab.layers.append import AppendUpper
from obdlab.layers.commit import ZeroBlocks, commit
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import SparseUpper
from obdlab.layers.zfile import ZFileWriter
from tests.layers.golden import LSMT, blob, entry, sha256_of
from tests.layers.lsmt_samples import Watched, layer, sealed_bytes

L1 = "11111111-1111-4111-8111-111111111111"
L2 = "22222222-2222-4222-8222-222222222222"


def append_upper(name: str) -> AppendUpper:
    return AppendUpper.open(LSMT / f"{name}.data", LSMT / f"{name}.index", read_only=True)


@pytest.mark.parametrize(
    ("source", "options", "golden"),
    [
        ("l1", {"uuid": L1, "user_tag": "layer 1 plain"}, "l1.plain.lsmt"),
        ("l1", {}, "l1.nouuid.lsmt"),
        ("l2", {"uuid": L2, "parent_uuid": L1, "user_tag": "layer 2 plain"}, "l2.plain.lsmt"),
        ("c1", {}, "c1.empty.lsmt"),
    ],
)
def test_bytes_are_the_originals(source: str, options: dict[str, str], golden: str) -> None:
    out = io.BytesIO()
    with append_upper(source) as upper:
        result = commit(upper, out, **options)
    assert out.getvalue() == (LSMT / golden).read_bytes()
    assert result.size == len(out.getvalue())


@pytest.mark.parametrize(("golden", "algorithm", "block_size"), [("lz4", "lz4", 4096), ("zstd16", "zstd", 16384)])
def test_compressed_bytes(golden: str, algorithm: str, block_size: int) -> None:
    out = io.BytesIO()
    with append_upper("l1") as upper, ZFileWriter(out, block_size=block_size, algorithm=algorithm) as writer:
        commit(upper, writer, uuid=L1, user_tag=f"layer 1 {golden}")
    if algorithm == "lz4":  # zstd's bytes depend on the library's version
        assert out.getvalue() == (LSMT / f"l1.{golden}.lsmt").read_bytes()
    wanted = entry(f"l1.{golden}.lsmt")["decoded_sha256"]
    assert sha256_of(Stack([open_layer(MemoryBlob(out.getvalue()))])) == wanted


def test_sums_of_an_empty_1_gib_layer() -> None:
    uuid = "abcdef01-2345-6789-abcd-ef0123456789"
    out = io.BytesIO()
    commit(LsmtLayer(MemoryBlob(sealed_bytes([], b"", 1 << 30))), out, uuid=uuid)
    assert hashlib.sha256(out.getvalue()).hexdigest() == (
        "6d33f9159461bdfc586921d70528d8b3edc01d2434e57a681c5a19f76b37b11e"
    )
    out = io.BytesIO()
    with ZFileWriter(out) as writer:
        commit(LsmtLayer(MemoryBlob(sealed_bytes([], b"", 1 << 30))), writer, uuid=uuid)
    assert hashlib.sha256(out.getvalue()).hexdigest() == (
        "11e5f59494a403dda31b05fd6c2c0755798f6ec3f944a39cbb97d85cec037e81"
    )


def test_sealed_in_place_compacts_to_the_same() -> None:
    out = io.BytesIO()
    commit(open_layer(blob("l1.sealed.lsmt")), out, uuid=L1, user_tag="layer 1 plain")
    assert out.getvalue() == (LSMT / "l1.plain.lsmt").read_bytes()


def test_flattened_stack_reads_the_same() -> None:
    stack = Stack([open_layer(blob("l1.plain.lsmt")), open_layer(blob("l2.lz4.lsmt"))])
    out = io.BytesIO()
    commit(stack, out, user_tag="flat")
    flat = open_layer(MemoryBlob(out.getvalue()))
    assert sha256_of(Stack([flat])) == sha256_of(stack)
    assert flat.virtual_size == stack.size
    assert flat.parent_uuid == stack.layers[0].parent_uuid
    assert flat.user_tag == "flat"


def test_flatten_keeps_layer_numbers_and_zeroed_segments() -> None:
    bottom = layer([(0, 16, False)], 0, seed=1)
    top = layer([(0, 4, False), (4, 4, True)], 8192, seed=2)
    out = io.BytesIO()
    result = commit(Stack([bottom, top]), out)
    assert (result.records, result.data_sectors) == (3, 12)
    assert decode_segments(out.getvalue()[4096 + 12 * 512 : -4096]).rows() == [
        (0, 4, 8, False, 0),
        (4, 4, 12, True, 0),
        (8, 8, 12, False, 1),
    ]


def test_long_data_is_joined_at_the_copy_chunks() -> None:
    # 40000 sectors in one piece: a file system extent, opened as records of 16383, copied in chunks of 64 sectors
    # (the last of each record is shorter), joined again below 16383.
    source = layer([(0, 16383, False), (16383, 16383, False), (32766, 7234, False)], 40000 * 512)
    out = io.BytesIO()
    commit(source, out)
    written = LsmtLayer(MemoryBlob(out.getvalue()))
    assert written.index.segments().length_sectors.tolist() == [16320, 16319, 7361]
    assert sha256_of(Stack([written])) == sha256_of(Stack([source]))


def test_data_is_read_and_written_in_large_pieces() -> None:
    watched = Watched(MemoryBlob(sealed_bytes([(0, 9000, 8, False, 0)], bytes(9000 * 512), 9000 * 512)))
    source = LsmtLayer(watched)
    watched.reads.clear()
    writes: list[int] = []

    class Sink:
        def write(self, data: bytes) -> None:
            writes.append(len(data))

    commit(source, Sink())
    piece = 512 << 10
    pieces = [piece - 4096, *[piece] * 7, 9000 * 512 - 8 * piece + 4096]  # with the header they end at whole ones
    assert [length for _, length in watched.reads] == pieces
    assert writes == [4096, *pieces, 4096, 4096]


def test_nothing_is_written_for_bad_options() -> None:
    out = io.BytesIO()
    with append_upper("l1") as upper:
        for options in ({"uuid": "x"}, {"parent_uuid": "x"}, {"user_tag": "x" * 257}):
            with pytest.raises(ValueError):
                commit(upper, out, **options)
    assert out.getvalue() == b""


def test_a_failing_source_fails_the_commit() -> None:
    class Failing(Blob):
        name = "gone"
        size = 10**9

        def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
            raise SourceError("gone", blob="gone", offset=offset)

    source = layer([(0, 16, False)], 8192)
    source.data = Failing()
    with pytest.raises(SourceError, match="gone at offset 4096"):
        commit(source, io.BytesIO())


def test_sparse_upper_commits(tmp_path: Path) -> None:
    with SparseUpper.create(tmp_path / "upper", 1 << 20, parent_uuid=L1) as upper:
        upper.write_at(8192, b"x" * 4096)
        upper.write_at(12288, b"y" * 1024)
        upper.discard(8192, 512)
        out = io.BytesIO()
        result = commit(upper, out)
        assert (result.records, result.data_sectors) == (1, 9)
        committed = open_layer(MemoryBlob(out.getvalue()))
        assert committed.parent_uuid == L1
        assert Stack([committed]).read_at(0, 1 << 20) == upper.read_at(0, 1 << 20)


def test_batches_of_the_index_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    # Long segments and many short ones that continue each other, cut into batches anywhere.
    extents = [(at, 63, False) for at in range(0, 630, 63)] + [(1000, 16383, False), (17383, 16383, True)]
    extents += [(33766, 9000, False), (42766, 100, False), (42866, 64, True), (42930, 3, False)]
    source = layer(extents, 50000 * 512)
    wanted = io.BytesIO()
    commit(source, wanted)
    for pieces in (1, 2, 3, 64, 257):
        monkeypatch.setattr(commit_module, "_BATCH_PIECES", pieces)
        out = io.BytesIO()
        commit(source, out)
        assert out.getvalue() == wanted.getvalue()


def test_zero_blocks() -> None:
    # Sectors 3 to 100 of data, of which 10 to 60 are zero: the whole blocks in there are 16 to 56.
    content = bytearray(b"d" * 512 * 97)
    content[7 * 512 : 57 * 512] = bytes(50 * 512)
    source = LsmtLayer(MemoryBlob(sealed_bytes([(3, 97, 8, False, 0)], bytes(content), 65536)))
    below = layer([(0, 128, False)], 65536, 5)
    disk = Stack([source]).read_at(0, 65536)
    for zero_blocks, sectors, records in (
        (ZeroBlocks.KEEP, 97, [(3, 97, 8, False, 0)]),
        (ZeroBlocks.MARK, 57, [(3, 13, 8, False, 0), (16, 40, 21, True, 0), (56, 44, 21, False, 0)]),
        (ZeroBlocks.DROP, 57, [(3, 13, 8, False, 0), (56, 44, 21, False, 0)]),
    ):
        out = io.BytesIO()
        result = commit(source, out, zero_blocks=zero_blocks)
        committed = LsmtLayer(MemoryBlob(out.getvalue()))
        assert result.data_sectors == sectors
        assert committed.index.segments().rows() == records
        assert Stack([committed]).read_at(0, 65536) == disk
        hides = Stack([below, committed]).read_at(16 * 512, 40 * 512) == bytes(40 * 512)
        assert hides == (zero_blocks is not ZeroBlocks.DROP)


def test_zero_blocks_of_a_flattened_stack() -> None:
    bottom = LsmtLayer(MemoryBlob(sealed_bytes([(0, 128, 8, False, 0)], b"b" * 65536, 65536)))
    top = LsmtLayer(MemoryBlob(sealed_bytes([(8, 64, 8, False, 0), (80, 8, 72, True, 0)], bytes(32768), 65536)))
    stack = Stack([bottom, top])
    for zero_blocks in ZeroBlocks:
        out = io.BytesIO()
        commit(stack, out, zero_blocks=zero_blocks)
        flat = LsmtLayer(MemoryBlob(out.getvalue()))
        assert Stack([flat]).read_at(0, 65536) == stack.read_at(0, 65536)
        tags = decode_segments(out.getvalue()[flat.trailer.index_offset : -4096]).tag.tolist()
        assert tags[0] == tags[-1] == 1  # the bottom layer's number, whatever was taken out between


def test_more_records_than_a_layer_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_module, "MAX_SEALED_RECORDS", 256)
    source = layer([(at * 2, 1, False) for at in range(257)], 1 << 20)
    out = io.BytesIO()
    with pytest.raises(FormatError, match="too many segments for one layer"):
        commit(source, out)
    assert out.getvalue() == b""


def test_stack_with_an_upper(tmp_path: Path) -> None:
    lower = layer([(0, 64, False)], 65536, 5)
    stack = WritableStack(Stack([lower]), SparseUpper.create(tmp_path / "upper", 0, parent_uuid=L1))
    stack.write_at(100, b"new")
    stack.set_virtual_size(131072)
    out = io.BytesIO()
    commit(stack, out, uuid=L2)
    flat = LsmtLayer(MemoryBlob(out.getvalue()))
    assert (flat.virtual_size, flat.uuid, flat.parent_uuid) == (131072, L2, lower.parent_uuid)
    assert Stack([flat]).read_at(0, 131072) == stack.read_at(0, 131072)
    out = io.BytesIO()
    commit(stack, out, virtual_size=65536, parent_uuid=L1)
    flat = LsmtLayer(MemoryBlob(out.getvalue()))
    assert (flat.virtual_size, flat.parent_uuid) == (65536, L1)
    stack.close()
