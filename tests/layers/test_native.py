"""The compiled form of packing and reading ZFile blocks beside Python's: the same bytes, and None for any damage."""

from __future__ import annotations

import io
import os
import platform
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob, Wrapper
from obdlab.errors import CorruptBlobError, SourceError
from obdlab.formats.zfile import Algorithm
from obdlab.formats.zfile.codec import Lz4
from obdlab.layers import native
from obdlab.layers.tarwrap import TarWrapWriter, open_tarwrap
from obdlab.layers.zfile import ZFileReader, ZFileWriter, open_zfile
from obdlab.localfile import LocalFile
from obdlab.observe import audit
from tests import capabilities
from tests.layers.zfile_samples import compress, golden

try:
    from obdlab.layers import _blocks
except ImportError as error:
    if platform.machine() != "x86_64":
        pytest.skip(f"only for x86-64: {error}", allow_module_level=True)
    capabilities.missing("tools", f"the compiled form of obdlab.layers: {error}")

SOURCE = golden("text.bin")[:100_001]
FORMS = {
    f"{kind}, {size} bytes, {'checked' if crc else 'unchecked'}": compress(SOURCE, size, kind, verify=crc)
    for kind in ("lz4", "zstd")
    for size in (4096, 65536)
    for crc in (True, False)
}
forms = pytest.mark.parametrize("data", FORMS.values(), ids=FORMS.keys())


def opened(data: bytes, monkeypatch: pytest.MonkeyPatch, switch: str) -> ZFileReader:
    monkeypatch.setenv(native.SWITCH, switch)
    return open_zfile(MemoryBlob(data, "layer"))


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled form is on, whatever the environment says."""
    monkeypatch.delenv(native.SWITCH, raising=False)


@forms
def test_both_forms_read_the_same(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, python = opened(data, monkeypatch, "1"), opened(data, monkeypatch, "0")
    assert compiled._unpack is not None
    assert python._unpack is None
    assert compiled._unpack_into is not None
    assert python._unpack_into is None
    source = random.Random(1)
    for _ in range(300):
        begin, end = sorted(source.sample(range(len(SOURCE) + 1), 2))
        assert compiled.read_at(begin, end - begin) == python.read_at(begin, end - begin) == SOURCE[begin:end]
        for reader in (compiled, python):
            out = bytearray(end - begin)
            reader.read_into(begin, memoryview(out))
            assert out == SOURCE[begin:end]


@forms
def test_sound_blocks_are_not_left_to_python(data: bytes) -> None:
    # ZFileReader reads again in Python after None, which would hide a wrong one.
    reader = open_zfile(MemoryBlob(data, "layer"))
    assert reader._unpack is not None
    for offset, length in [(0, len(SOURCE)), (len(SOURCE) - 1, 1), (65_536, len(SOURCE) - 65_536), (4095, 2)]:
        begin, end = reader.map_range(offset, offset + length)
        assert reader._unpack(data[begin:end], offset, length) == SOURCE[offset : offset + length]
        out = bytearray(length + 2)
        assert reader._unpack_into is not None
        assert reader._unpack_into(data[begin:end], offset, memoryview(out)[1:-1])
        assert out == b"\0" + SOURCE[offset : offset + length] + b"\0"


@forms
@settings(max_examples=150)
@given(draw=st.data())
def test_changed_stored_bytes(data: bytes, draw: st.DataObject) -> None:
    reader = open_zfile(MemoryBlob(data, "layer"))
    assert reader._unpack is not None
    begin, end = reader.map_range(0, reader.size)
    changed = bytearray(data[begin:end])
    for _ in range(draw.draw(st.integers(1, 4))):
        changed[draw.draw(st.integers(0, len(changed) - 1))] ^= draw.draw(st.integers(1, 255))
    got = reader._unpack(bytes(changed), 0, reader.size)
    if reader.header.verify and bytes(changed) != data[begin:end]:
        assert got is None
    else:
        assert got is None or len(got) == reader.size


@forms
@pytest.mark.parametrize("change", [-1, 1, -4000, 4000])
def test_stored_bytes_of_another_length(data: bytes, change: int) -> None:
    reader = open_zfile(MemoryBlob(data, "layer"))
    assert reader._unpack is not None
    begin, end = reader.map_range(0, reader.size)
    assert reader._unpack(data[begin : end + change] + bytes(max(change, 0)), 0, reader.size) is None


@forms
@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 100_002), (100_001, 1), (1 << 63, 1 << 63)])
def test_ranges_outside(data: bytes, offset: int, length: int) -> None:
    reader = open_zfile(MemoryBlob(data, "layer"))
    assert reader._unpack is not None
    with pytest.raises(ValueError):
        reader._unpack(data, offset, length)
    if length < 1 << 20:
        assert reader._unpack_into is not None
        with pytest.raises(ValueError):
            reader._unpack_into(data, offset, bytearray(length))
        with pytest.raises((BufferError, TypeError)):
            reader._unpack_into(data, 0, b"read-only")


@forms
def test_a_file_is_read_by_compiled_code(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer"
    with path.open("wb") as file, TarWrapWriter(file) as tar:
        tar.write(data)
    with open_zfile(open_tarwrap(LocalFile(path))) as reader:
        # Nothing but the descriptor is used.
        monkeypatch.setattr(reader, "_read_stored", lambda *_: pytest.fail("read in Python"))
        for offset, length in [(0, len(SOURCE)), (len(SOURCE) - 1, 1), (65_536, len(SOURCE) - 65_536), (4095, 2)]:
            assert reader.read_at(offset, length) == SOURCE[offset : offset + length]
            out = bytearray(length)
            reader.read_into(offset, memoryview(out))
            assert out == SOURCE[offset : offset + length]
        monkeypatch.undo()
        os.truncate(path, 3 * 512 + 600)
        with pytest.raises(SourceError, match=r"shorter|short|end"):
            reader.read_at(0, len(SOURCE))
    with pytest.raises(SourceError, match="read after close"):
        reader.read_at(0, 1)
    with pytest.raises(SourceError, match="read after close"):
        reader.read_into(0, memoryview(bytearray(1)))


def test_wrappers_of_a_file_see_all_reads(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(next(iter(FORMS.values())))
    file = LocalFile(tmp_path / "layer")
    assert file.in_file() == (file, 0)
    assert Wrapper(file).in_file() is None
    assert open_zfile(Wrapper(file))._from_file is None
    audit.configure(tmp_path / "audit")
    try:
        assert LocalFile(tmp_path / "layer").in_file() is None
    finally:
        audit.configure(None)


@pytest.mark.parametrize(
    ("offsets", "block_size", "size", "algorithm"),
    [
        (bytes(8), 4096, 8192, 1),
        (bytes(12), 0, 8192, 1),
        (bytes(12), 1 << 17, 8192, 1),
        (bytes(12), 4096, 8192, 3),
    ],
)
def test_what_cannot_be_unpacked(offsets: bytes, block_size: int, size: int, algorithm: int) -> None:
    with pytest.raises(ValueError):
        _blocks.Unpacker(memoryview(offsets).cast("I"), block_size, size, algorithm, True)


@pytest.mark.parametrize("table", [[5, 4, 9], [0, 0, 9], [0, 9, 1 << 31], [0, 1 << 31, (1 << 32) - 1]])
def test_hostile_offsets(table: list[int]) -> None:
    offsets = memoryview(b"".join(each.to_bytes(4, "little") for each in table)).cast("I")
    for algorithm in (1, 2):
        assert _blocks.Unpacker(offsets, 4096, 8192, algorithm, True).read(bytes(9), 0, 8192) is None


@pytest.mark.parametrize(("kind", "algorithm"), [("lz4", 1), ("zstd", 2)])
@pytest.mark.parametrize(
    ("content", "after", "sound"),
    [
        pytest.param(4096, b"", True, id="whole"),
        pytest.param(4000, b"", False, id="too short"),
        pytest.param(4097, b"", False, id="too long"),
        # An empty skippable frame of zstd: its library passes over it.
        pytest.param(4096, b"\x50\x2a\x4d\x18" + bytes(4), False, id="followed by a frame"),
    ],
)
def test_a_block_of_another_length(kind: str, algorithm: int, content: int, after: bytes, sound: bool) -> None:
    sample = compress(SOURCE[:content], 8192, kind, verify=False)
    begin, end = open_zfile(MemoryBlob(sample, "layer")).map_range(0, content)
    stored = sample[begin:end] + after
    offsets = memoryview(bytes(4) + len(stored).to_bytes(4, "little")).cast("I")
    got = _blocks.Unpacker(offsets, 4096, 4096, algorithm, False).read(stored, 0, 4096)
    assert got == (SOURCE[:4096] if sound else None)


def test_damage_is_named_as_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(next(iter(FORMS.values())))
    data[600] ^= 1
    told = []
    for switch in ("1", "0"):
        reader = opened(bytes(data), monkeypatch, switch)
        with pytest.raises(CorruptBlobError) as caught:
            reader.read_at(0, reader.size)
        told.append(str(caught.value))
    assert told[0] == told[1]


@settings(max_examples=150)
@given(
    repeats=st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.integers(1, 90)), max_size=12),
    noise=st.integers(0, 70_000),
    block_size=st.sampled_from([4096, 16384, 65536]),
    checked=st.booleans(),
)
def test_both_forms_pack_the_same(
    repeats: list[tuple[bytes, int]], noise: int, block_size: int, checked: bool
) -> None:
    content = b"".join(part * count for part, count in repeats) + random.Random(noise).randbytes(noise)
    pack = native.packer(Algorithm.LZ4)
    assert pack is not None
    for data in (content, bytearray(content)):
        got = pack(data, block_size, checked)
        assert got == Lz4().store(memoryview(content), block_size, crcs=checked)


def test_threads_pack_the_same_at_once() -> None:
    pack = native.packer(Algorithm.LZ4)
    assert pack is not None
    wanted = Lz4().store(memoryview(SOURCE), 4096, crcs=True)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: pack(SOURCE, 4096, True), range(40))) == [wanted] * 40


def test_what_is_left_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.packer(Algorithm.ZSTD) is None
    # Another version of the library may choose other bytes, and a build of older code has no such function.
    monkeypatch.setattr(_blocks, "LZ4_VERSION", native.LZ4_VERSION + 1)
    assert native.packer(Algorithm.LZ4) is None
    monkeypatch.delattr(_blocks, "LZ4_VERSION")
    assert native.packer(Algorithm.LZ4) is None
    monkeypatch.setattr(_blocks, "Unpacker", object)
    assert open_zfile(MemoryBlob(next(iter(FORMS.values()))))._unpack is None
    monkeypatch.undo()
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.packer(Algorithm.LZ4) is None


def test_wrong_batches_are_refused() -> None:
    for block_size in (0, -1, 1 << 17):
        with pytest.raises(ValueError):
            _blocks.store(b"data", block_size, True)
    with pytest.raises(TypeError):
        _blocks.store("text", 4096, True)  # type: ignore[arg-type]


def test_a_writer_takes_the_compiled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, store = [], _blocks.store
    monkeypatch.setattr(_blocks, "store", lambda data, *more: sizes.append(len(data)) or store(data, *more))
    out = io.BytesIO()
    with ZFileWriter(out, workers=2) as writer:
        writer.write(SOURCE)
    assert sizes == [len(SOURCE)]
    assert out.getvalue() == compress(SOURCE, 4096, "lz4")
    monkeypatch.setenv(native.SWITCH, "0")
    assert out.getvalue() == compress(SOURCE, 4096, "lz4")
    assert sizes == [len(SOURCE)] * 2
