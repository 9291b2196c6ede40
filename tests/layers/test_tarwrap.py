"""Wrapped blobs as blobs, and writing them."""

from __future__ import annotations

import io

import pytest

from obdlab.blob import MemoryBlob
from obdlab.errors import FormatError, OutOfRangeError
from obdlab.formats.tar import wrap_header, wrap_tail
from obdlab.layers.tarwrap import TarWrapError, TarWrapWriter, open_tarwrap
from tests.layers.zfile_samples import golden

CONTENT = b"content of the layer" * 100
WRAPPED = wrap_header(len(CONTENT)) + CONTENT + wrap_tail(len(CONTENT))


class Below(MemoryBlob):
    evicted: tuple[int, int] | None = None
    closed = False

    def evict(self, offset: int, length: int) -> None:
        self.evicted = (offset, length)

    def close(self) -> None:
        self.closed = True


def test_content_by_position() -> None:
    below = Below(WRAPPED, "blob")
    with open_tarwrap(below) as content:
        assert content.size == len(CONTENT)
        assert content.name == "blob"
        assert content.read_at(0, content.size) == CONTENT
        assert content.read_at(7, 100) == CONTENT[7:107]
        assert content.read_at(content.size, 0) == b""
        content.evict(10, 20)
        assert below.evicted == (1546, 20)
    assert below.closed


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, 2001), (2000, 1), (5, -1)])
def test_the_tar_around_it_cannot_be_read(offset: int, length: int) -> None:
    content = open_tarwrap(MemoryBlob(WRAPPED, "blob"))
    with pytest.raises(OutOfRangeError, match="blob"):
        content.read_at(offset, length)


@pytest.mark.parametrize("data", [b"", b"x", bytes(512), golden("one.lz4.4.zfile"), golden("text.bin")])
def test_anything_else_is_used_as_it_is(data: bytes) -> None:
    blob = MemoryBlob(data)
    assert open_tarwrap(blob) is blob


def test_cut_short() -> None:
    open_tarwrap(MemoryBlob(WRAPPED[: 1536 + len(CONTENT)]))
    for length in (1536, 1536 + len(CONTENT) - 1):
        with pytest.raises(FormatError, match=rf"blob: .*past the blob's end .*wanted inside \[0, {length}\)"):
            open_tarwrap(MemoryBlob(WRAPPED[:length], "blob"))
    with pytest.raises(FormatError, match="no file header after the pax header"):
        open_tarwrap(MemoryBlob(WRAPPED[:1500], "blob"))


def test_writing_with_a_seekable_sink() -> None:
    out = io.BytesIO(b"before")
    out.seek(6)
    with TarWrapWriter(out) as writer:
        assert writer.write(b"????") == 4
        writer.write(CONTENT[4:])
        assert writer.seek(0) == 0
        writer.write(memoryview(CONTENT)[:4])
        assert writer.tell() == 4
        assert open_tarwrap(MemoryBlob(out.getvalue()[6:])).size == len(out.getvalue()) - 6, "not a tar yet"
    out.write(b"after")
    assert out.getvalue() == b"before" + WRAPPED + b"after"
    with pytest.raises(TarWrapError):
        writer.write(b"x")
    with pytest.raises(TarWrapError):
        writer.close()


def test_seeking_outside_the_content() -> None:
    writer = TarWrapWriter(io.BytesIO())
    writer.write(b"12345")
    for offset in (-1, 6):
        with pytest.raises(TarWrapError, match=f"got {offset}, wanted 0 to 5"):
            writer.seek(offset)


def test_an_exception_leaves_the_placeholder() -> None:
    out = io.BytesIO()
    writer = TarWrapWriter(out)
    writer.write(CONTENT)
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    assert b"ustar" not in out.getvalue()
