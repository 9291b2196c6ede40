"""Warp layers: the original's files, stacks with ordinary layers, and what is read of which file."""

from __future__ import annotations

import io
from functools import partial

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.errors import FormatError, OutOfRangeError
from obdlab.formats.lsmt.layout import HEADER_SPACE, Segments, Trailer, decode_segments
from obdlab.formats.lsmt.warp import REMOTE, check_warp_segments
from obdlab.layerfiles.verification import verification_size, verify_layers
from obdlab.layerfiles.writing import Packing, write_packed
from obdlab.layers.budget import Budget
from obdlab.layers.commit import ZeroBlocks, commit
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.layers.recorder import Recorder, reads_of
from obdlab.layers.stack import Stack
from obdlab.layers.warp import WarpFile, WarpLayer
from obdlab.layers.zfile import open_zfile
from tests.layers.golden import sha256_of, target_tar, turbo_stack, warp_file
from tests.layers.lsmt_samples import Watched, layer, sealed_bytes

NAMES = ["l1", "l2", "l3", "good", "other", "plain.tar"]


def opened(name: str, target: Blob | None = None) -> LsmtLayer:
    return open_layer(warp_file(name), kind=partial(WarpLayer, target or target_tar(name)))


@pytest.mark.parametrize("names", [["l1", "l2", "l3"], ["good"], ["plain.tar"]])
def test_stacks_of_the_original(names: list[str]) -> None:
    wanted = turbo_stack(*names)
    with Stack([opened(name) for name in names]) as stack:
        assert stack.size == wanted["vsize"]
        assert sha256_of(stack, 4 << 20) == wanted["decoded_sha256"]


def _records_of(content: Blob) -> tuple[Segments, Segments]:
    # The records that point into the file, and those that point into the target.
    trailer = Trailer.from_bytes(content[-HEADER_SPACE:])
    records = content.read_at(trailer.index_offset, trailer.index_size * 16)
    checked = check_warp_segments(decode_segments(records), trailer.index_offset, 1 << 40)
    remote = checked.tag == REMOTE
    return checked[~remote], checked[remote]


@pytest.mark.parametrize("name", NAMES)
def test_what_commit_writes_is_what_the_original_wrote(name: str) -> None:
    content = open_zfile(warp_file(name))
    local, remote = _records_of(content)
    assert len(local)
    assert len(remote)
    size = Trailer.from_bytes(content[-HEADER_SPACE:]).virtual_size
    rows = [(*row[:4], 0) for row in local.rows()]
    source = LsmtLayer(
        MemoryBlob(sealed_bytes(rows, content[4096 : 4096 + 512 * int(local.length_sectors.sum())], size))
    )
    file = io.BytesIO()
    committed, _ = write_packed(
        file, Packing("lz4", 4096), lambda sink: commit(source, sink, remote=remote), name=name
    )
    assert committed.size == content.size
    assert committed.records == len(local) + len(remote)
    assert open_zfile(MemoryBlob(file.getvalue()))[:] == content[:]
    assert file.getvalue() == warp_file(name)[:]


def test_long_remote_records_are_split_and_overlaps_refused() -> None:
    source = layer([(0, 4, False), (50_000, 1, False)], 25_700_000)
    out = io.BytesIO()
    commit(source, out, remote=Segments.from_rows([(4, 40_000, 7, False, 0)]))
    tar = MemoryBlob(bytes(40_007 * 512))
    local, remote = _records_of(MemoryBlob(out.getvalue()))
    assert [row[1:3] for row in remote.rows()] == [(16383, 7), (16383, 16390), (7234, 32773)]
    assert len(local) == 2
    assert sha256_of(Stack([WarpLayer(tar, MemoryBlob(out.getvalue()))])) == sha256_of(Stack([source]))
    for rows in ([(3, 1, 0, False, 0)], [(5, 3, 0, False, 0), (7, 1, 0, False, 0)]):
        with pytest.raises(ValueError, match="overlap"):
            commit(source, io.BytesIO(), remote=Segments.from_rows(rows))  # type: ignore[arg-type]


def test_each_read_goes_to_the_file_that_holds_it() -> None:
    own = Watched(MemoryBlob(sealed_bytes([(0, 1, 8, False, 0), (1, 2, 3, False, 1)], b"m" * 512, 4096)))
    tar = Watched(MemoryBlob(bytes(range(256)) * 10))
    with Stack([WarpLayer(tar, own)]) as stack:
        assert tar.reads == []
        own.reads.clear()
        assert stack.read_at(600, 10) == tar.blob.read_at(3 * 512 + 88, 10)
        assert stack.read_at(0, 4096) == b"m" * 512 + tar.blob.read_at(1536, 1024) + bytes(2560)
        assert own.reads == [(4096, 512)]
        assert tar.reads == [(1624, 10), (1536, 1024)]
        stack.evict(0, 1024)
        assert own.evicted[-1:] == [(4096, 512)]
        assert tar.evicted == [(1536, 512)]
    assert own.closed
    assert tar.closed


def test_the_file_of_both_has_zeros_between() -> None:
    file = WarpFile(MemoryBlob(b"o" * 700), MemoryBlob(b"t" * 900))
    assert file.size == 1924
    whole = b"o" * 700 + bytes(324) + b"t" * 900
    for begin in (0, 699, 700, 1000, 1023, 1024, 1900):
        for end in (700, 701, 1024, 1025, 1924):
            if begin <= end:
                assert file.read_at(begin, end - begin) == whole[begin:end]
    for begin, length in ((-1, 2), (0, 1925), (1924, 1), (2000, -1), (1030, -4)):
        with pytest.raises(OutOfRangeError):
            file.read_at(begin, length)


def test_a_short_target_is_refused_at_opening() -> None:
    tar = target_tar("plain.tar")
    with pytest.raises(FormatError, match=r"^short: plain.*needs more bytes .*got 74752 bytes.*at least 76800"):
        opened("plain.tar", MemoryBlob(tar[:74752], "short"))
    # The index of a gzip layer of several members knows the first alone.
    with pytest.raises(FormatError, match="at least 4097536"):
        opened("good", MemoryBlob(target_tar("good")[:1642596]))


def test_a_warp_layer_among_ordinary_ones() -> None:
    warp = opened("plain.tar")
    below, above = layer([(0, 9_000, False)], warp.virtual_size, 1), layer([(5192, 4, False)], 0, 2)
    stack = Stack([below, warp, above])
    file = next(row for row in warp.index.segments().rows() if row[2] * 512 >= warp.file.size)
    assert stack.read_at(5192 * 512, 2048) == Stack([above, layer([], 1 << 30)]).read_at(5192 * 512, 2048)
    begin = (file[0] + 8) * 512
    assert stack.read_at(begin, 4096) == Stack([warp]).read_at(begin, 4096)
    out = io.BytesIO()
    commit(stack, out, zero_blocks=ZeroBlocks.DROP)
    assert Stack([LsmtLayer(MemoryBlob(out.getvalue()))])[: 8 << 20] == stack[: 8 << 20]


def test_reads_of_the_target_are_recorded_behind_those_of_the_file() -> None:
    warp = opened("plain.tar")
    recorder = Recorder()
    stack = Stack([warp])
    stack.watch(recorder.around)
    rows = [row for row in warp.index.segments().rows() if row[2] * 512 >= warp.file.size]
    stack.read_at(rows[0][0] * 512, 4096)
    ((number, offset, length),) = reads_of(recorder.to_bytes())
    assert (number, length) == (0, 4096)
    assert warp.data.read_at(offset, length) == stack.read_at(rows[0][0] * 512, 4096)
    assert offset >= warp.file.size


def test_verification_reads_both_files() -> None:
    stack = Stack([opened("plain.tar")])
    done: list[int] = []
    (found,) = verify_layers(stack, done.append)
    assert found.checksums
    assert sum(done) == verification_size(stack) > target_tar("plain.tar").size


def test_its_tables_count_against_the_budget() -> None:
    with pytest.raises(FormatError, match="too much memory"):
        open_layer(warp_file("l1"), budget=Budget(1000), kind=partial(WarpLayer, target_tar("l1")))
