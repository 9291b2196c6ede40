"""zlib's inflate, stopping at the ends of deflate blocks."""

from __future__ import annotations

import subprocess
import sys
import zlib

import pytest

from obdlab.errors import CorruptBlobError, SourceError
from obdlab.system import libz
from obdlab.system.libz import BlockInflater


def blocks(*parts: bytes, flush: int = zlib.Z_FULL_FLUSH) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(part) + packer.flush(flush) for part in parts) + packer.flush()


def test_it_stops_at_the_header_and_after_each_block() -> None:
    output = bytearray(100)
    gz = blocks(b"first", b"second")
    with BlockInflater(output) as inflater:
        inflater.feed(gz)
        borders = []
        while not inflater.step():
            borders.append((inflater.filled, inflater.border(), len(gz) - inflater.unused))
    assert bytes(output[: inflater.filled]) == b"firstsecond"
    assert borders[0] == (0, 0, 10)
    # Each part is a block, and each flush an empty one that ends at a whole byte. The last block is empty, too.
    assert [filled for filled, _, _ in borders[1:]] == [5, 5, 11, 11, 11]
    assert [bits for _, bits, _ in borders[2::2]] == [0, 0]
    assert borders[5][1] is None
    assert all(zlib.decompressobj(-15).decompress(gz[at:]) == b"second" for filled, _, at in borders[2:3])


def test_the_end_of_the_last_block_is_no_border() -> None:
    with BlockInflater(bytearray(100)) as inflater:
        inflater.feed(zlib.compress(b"content", wbits=31))
        borders = []
        while not inflater.step():
            borders.append((inflater.filled, inflater.border()))
        assert borders == [(0, 0), (7, None)]
        assert inflater.border() is None


def test_output_without_room_waits_for_it() -> None:
    output = bytearray(16)
    data = bytes(range(200))
    found = b""
    with BlockInflater(output) as inflater:
        inflater.feed(zlib.compress(data, wbits=31))
        while not inflater.step():
            if inflater.filled == len(output):
                found += output
                inflater.filled = 0
        found += output[: inflater.filled]
    assert found == data


def test_members_follow_each_other() -> None:
    gz = zlib.compress(b"one", wbits=31) + zlib.compress(b"two", wbits=31)
    output = bytearray(10)
    with BlockInflater(output) as inflater:
        inflater.feed(gz)
        while not inflater.step():
            pass
        rest = inflater.rest()
        assert rest == zlib.compress(b"two", wbits=31)
        inflater.next_member()
        inflater.feed(rest)
        while not inflater.step():
            pass
        assert inflater.rest() == b""
        assert output[: inflater.filled] == b"onetwo"


@pytest.mark.parametrize(("at", "why"), [(0, "header check"), (-8, "data check"), (-1, "length check")])
def test_damage_has_zlibs_reason(at: int, why: str) -> None:
    gz = bytearray(zlib.compress(b"content", wbits=31))
    gz[at] ^= 1
    with BlockInflater(bytearray(100)) as inflater:
        inflater.feed(bytes(gz))
        with pytest.raises(CorruptBlobError, match=rf"does not inflate \(incorrect {why}\)"):
            [inflater.step() for _ in range(5)]


def test_without_the_library_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libz, "_NAME", "libz-of-nowhere.so.1")
    libz._library.cache_clear()
    try:
        with pytest.raises(SourceError, match=r"libz-of-nowhere.so.1: zlib cannot be loaded .* install zlib1g"):
            BlockInflater(bytearray(10))
    finally:
        libz._library.cache_clear()


def test_the_memory_is_freed() -> None:
    program = (
        "import resource\n"
        "from obdlab.system.libz import BlockInflater\n"
        "def run(count):\n"
        "    for _ in range(count):\n"
        "        with BlockInflater(bytearray(10)) as inflater:\n"
        "            inflater.feed(b'\\x1f\\x8b\\x08')\n"
        "            inflater.step()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(run(100), run(5000))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    before, after = map(int, done.stdout.split())
    assert after - before < 4096  # KiB; a stream has 7 KiB
