"""The compiled form of reading ZFile blocks beside Python's: the same bytes, and None for any damage."""

from __future__ import annotations

import random
import shutil
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.errors import CorruptBlobError
from obdlab.layers import native
from obdlab.layers.zfile import ZFileReader, open_zfile
from tests import capabilities
from tests.layers.zfile_samples import compress, golden

try:
    from obdlab.layers import _blocks
except ImportError as error:
    # With a compiler and Python's headers it must be there.
    if shutil.which("gcc") and Path(sysconfig.get_paths()["include"], "Python.h").exists():
        capabilities.missing("tools", f"the compiled form of obdlab.layers: {error}")
    pytest.skip(f"the compiled form is not built here: {error}", allow_module_level=True)

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
    source = random.Random(1)
    for _ in range(300):
        begin, end = sorted(source.sample(range(len(SOURCE) + 1), 2))
        assert compiled.read_at(begin, end - begin) == python.read_at(begin, end - begin) == SOURCE[begin:end]


@forms
def test_sound_blocks_are_not_left_to_python(data: bytes) -> None:
    # ZFileReader reads again in Python after None, which would hide a wrong one.
    reader = open_zfile(MemoryBlob(data, "layer"))
    assert reader._unpack is not None
    for offset, length in [(0, len(SOURCE)), (len(SOURCE) - 1, 1), (65_536, len(SOURCE) - 65_536), (4095, 2)]:
        begin, end = reader.map_range(offset, offset + length)
        assert reader._unpack(data[begin:end], offset, length) == SOURCE[offset : offset + length]


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
