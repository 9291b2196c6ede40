"""Opening sealed layers: golden files, damage, and the number of reads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob, check_range
from obdlab.call import Call
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats.lsmt.layout import Flags, Trailer, encode_segments
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.layers.stack import Stack
from obdlab.layers.upper import SparseUpper
from tests.layers.golden import GOLDEN, LSMT, blob, entry, manifest, sha256_of
from tests.layers.lsmt_samples import Watched, sealed_bytes

SEALED = [
    name
    for item in manifest("lsmt")["entries"]
    for name in item.get("files", ())
    if name.endswith(".lsmt") and item["decoded_sha256"]
]


@pytest.mark.parametrize("name", SEALED)
@pytest.mark.parametrize("step", [1 << 20, 5000])
def test_golden_layer_decodes(name: str, step: int) -> None:
    with Stack([open_layer(blob(name))]) as stack:
        assert stack.size == entry(name)["vsize"]
        assert sha256_of(stack, step) == entry(name)["decoded_sha256"]


def test_golden_stack_decodes() -> None:
    item = next(item for item in manifest("lsmt")["entries"] if "stack" in item)
    assert sha256_of(Stack([open_layer(blob(name)) for name in item["stack"]])) == item["decoded_sha256"]
    mixed = Stack([open_layer(blob("l1.lz4tar.lsmt")), open_layer(blob("l2.sealed.lsmt"))])
    assert sha256_of(mixed) == item["decoded_sha256"]


@pytest.mark.parametrize("depth", [1, 2])
def test_golden_file_system_decodes(depth: int) -> None:
    names = [f"layer{i}.obd" for i in range(1, depth + 1)]
    stack = Stack([open_layer(MemoryBlob((GOLDEN / "ext4" / name).read_bytes(), name)) for name in names])
    wanted = manifest("ext4")["merged"][f"layers1-{depth}"]
    assert stack.size == wanted["vsize"]
    assert sha256_of(stack) == wanted["raw_sha256"]


def test_what_a_layer_tells() -> None:
    committed = open_layer(blob("l2.plain.lsmt"))
    assert committed.uuid == "22222222-2222-4222-8222-222222222222"
    assert committed.parent_uuid == "11111111-1111-4111-8111-111111111111"
    assert committed.user_tag == "layer 2 plain"
    assert committed.virtual_size == 1 << 20
    assert not committed.sealed_in_place
    sealed = open_layer(blob("l2.sealed.lsmt"))
    assert sealed.sealed_in_place
    assert sealed.uuid == committed.uuid
    assert len(sealed.index) > len(committed.index)
    assert open_layer(blob("c1.empty.lsmt")).index.lookup(0, 9)[0][2] < 0


def test_a_sparse_layer_sealed_in_place(tmp_path: Path) -> None:
    # As the original seals: index after the disk's bytes, its end padded with garbage, the header left as it was.
    disk = 100 * 512
    with SparseUpper.create(tmp_path / "u", disk, user_tag="never copied") as upper:
        upper.write_at(4096, b"x" * 8192)
        upper.write_at(99 * 512, b"end" * 170)
        rows = upper.index.segments()
        wanted = upper.read_at(0, disk)
    trailer = Trailer(
        flags=Flags.DATA | Flags.SEALED | Flags.SPARSE,
        virtual_size=disk,
        uuid=upper.uuid,
        index_offset=4096 + disk,
        index_size=len(rows),
    )
    content = (tmp_path / "u").read_bytes() + encode_segments(rows).ljust(512, b"g") + trailer.to_bytes()
    sealed = open_layer(MemoryBlob(content))
    assert sealed.sealed_in_place
    assert sealed.uuid == upper.uuid
    assert len(sealed.index) == 2
    assert Stack([sealed]).read_at(0, disk) == wanted


def test_opening_takes_few_reads() -> None:
    small = Watched(MemoryBlob(sealed_bytes([(0, 1, 8, False, 0)], bytes(512), 4096)))
    LsmtLayer(small)
    assert small.reads == [(small.size - 8192, 8192), (0, 4096)]

    golden = Watched(blob("l1.plain.lsmt"))
    LsmtLayer(golden)
    assert golden.reads == [(golden.size - 8192, 8192), (0, 4096)]

    rows = [(2 * i, 1, 8, False, 0) for i in range(10_000)]
    large = Watched(MemoryBlob(sealed_bytes(rows, bytes(512), 1 << 24)))
    opened = LsmtLayer(large)
    assert large.reads == [(large.size - 8192, 8192), (0, 4096), (4608, large.size - 8192 - 4608)]
    assert opened.index.segments().rows() == rows


def test_stored_tags_mean_nothing() -> None:
    flattened = MemoryBlob(sealed_bytes([(0, 1, 8, False, 3), (1, 1, 8, True, 9)], bytes(512), 1024))
    assert LsmtLayer(flattened).index.segments().tag.tolist() == [0, 0]


GOOD = (LSMT / "l1.plain.lsmt").read_bytes()


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4095, 4096, 8191, 8192, 100_000, len(GOOD) - 4096, len(GOOD) - 1])
def test_a_cut_layer_is_refused_and_named(size: int) -> None:
    with pytest.raises(FormatError) as caught:
        open_layer(MemoryBlob(GOOD[:size], "cut.lsmt"))
    assert str(caught.value).startswith("cut.lsmt: ")


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        ([(0, 2, 8, False, 0)], 512, "points outside of the layer's data at offset 4608"),
        ([(4, 1, 8, False, 0), (0, 1, 8, False, 0)], 512, "record 1 is out of order at offset 4608"),
    ],
)
def test_a_bad_index_is_refused(rows: list[tuple[int, int, int, bool, int]], data: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open_layer(MemoryBlob(sealed_bytes(rows, bytes(data), 4096)))


def test_other_files_are_refused() -> None:
    with pytest.raises(FormatError, match=r"x: neither a ZFile nor an LSMT layer at offset 0 \(got 6e6f"):
        open_layer(MemoryBlob(b"nothing of the kind" * 1000, "x"))
    with pytest.raises(FormatError, match="got nothing"):
        open_layer(MemoryBlob(b"", "x"))
    wrong = GOOD[:-4096] + bytes(4096)
    with pytest.raises(FormatError, match="trailer has a wrong magic"):
        open_layer(MemoryBlob(wrong))
    with pytest.raises(FormatError, match=r"l1.index: LSMT file is not a data file at offset 28 \(got flags 0x1\)"):
        open_layer(MemoryBlob((LSMT / "l1.index").read_bytes() + bytes(4096), "l1.index"))


@pytest.mark.parametrize("size", [4096, 8191, 8192, None])
def test_a_writable_layer_is_told_from_a_damaged_one(size: int | None) -> None:
    content = (LSMT / "l1.data").read_bytes()[:size]
    with pytest.raises(FormatError, match=r"^l1.data: writable layer \(not sealed\): commit or seal it first$"):
        open_layer(MemoryBlob(content, "l1.data"))


class _WrongUntilEvicted(MemoryBlob):
    # A cache that has kept a wrong answer.
    wrong = True

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        data = super().read_at(offset, length, call)
        return bytes(length) if self.wrong else data

    def evict(self, offset: int, length: int) -> None:
        check_range(self, offset, length)
        self.wrong = False


@pytest.mark.parametrize("name", ["l1.plain.lsmt", "l1.lz4tar.lsmt", "l1.lz4.lsmt"])
def test_wrong_headers_in_a_cache_are_asked_for_again(name: str) -> None:
    kept = _WrongUntilEvicted((LSMT / name).read_bytes())
    assert len(open_layer(kept).index) == len(open_layer(blob(name)).index)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_damaged_metadata_gives_an_error_or_a_readable_layer(seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(GOOD)
    index_at = len(GOOD) - 8192
    for _ in range(rng.randint(1, 8)):
        at = rng.choice((rng.randrange(390), len(data) - 4096 + rng.randrange(390), index_at + rng.randrange(1024)))
        data[at] = rng.choice((0, 0xFF, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
    try:
        stack = Stack([open_layer(MemoryBlob(bytes(data)))])
        for at in (0, 4096 * rng.randrange(300)):
            stack.read_at(min(at, stack.size), min(4096, stack.size - min(at, stack.size)))
    except ObdlabError:
        pass
