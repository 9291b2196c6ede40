"""Damaged bytes give an error of this package or a layer that can be read, in bounded memory, whatever they claim."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obdlab.blob import Blob, MemoryBlob
from obdlab.call import Call
from obdlab.errors import FormatError, ObdlabError
from obdlab.formats.lsmt.layout import HEADER_SPACE, Header, Trailer, decode_segments, is_lsmt, meant_records
from obdlab.layers.append import AppendUpper
from obdlab.layers.lsmt import LsmtLayer, open_layer
from obdlab.layers.stack import Stack, WritableStack
from obdlab.layers.upper import open_upper
from tests.layers.golden import LSMT
from tests.layers.uppers import KINDS, Files

DISK = 128 << 10
_SEALED = ("l1.plain.lsmt", "l1.sealed.lsmt", "l1.lz4.lsmt", "l1.lz4tar.lsmt", "c1.empty.lsmt")
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, mostly where structures are, perhaps cut."""
    out = bytearray(content)
    places = (
        lambda: rng.randrange(min(512, len(out))),
        lambda: max(0, len(out) - 4096) + rng.randrange(min(400, len(out))),
        lambda: max(0, len(out) - 8192) + rng.randrange(min(4096, len(out))),
        lambda: rng.randrange(len(out)),
    )
    for _ in range(rng.randint(1, 5)):
        at = min(rng.choice(places)(), len(out) - 1)
        if rng.random() < 0.3:
            out[at : at + 8] = struct.pack(
                "<Q", rng.choice((0, 1, 2**63, 2**64 - 1, 128_000_000, rng.getrandbits(40)))
            )
        else:
            out[at] = rng.choice((*_INTERESTING, rng.randrange(256)))
    if rng.random() < 0.2:
        del out[rng.randrange(len(out)) :]
    return bytes(out)


def read_all_of(blob: Blob) -> None:
    for at in range(0, min(blob.size, 1 << 20), 65536):
        blob.read_at(at, min(65536, blob.size - at))


def fuzz_sealed(seed: int) -> None:
    rng = random.Random(seed)
    content = damaged((LSMT / rng.choice(_SEALED)).read_bytes(), rng)
    try:
        read_all_of(Stack([open_layer(MemoryBlob(content))]))
    except ObdlabError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**40))
def test_sealed_layers(seed: int) -> None:
    fuzz_sealed(seed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sealed_layers_long() -> None:
    for seed in range(60_000):
        fuzz_sealed(seed)


def fuzz_upper(folder: Path, kind: str, seed: int) -> None:
    rng = random.Random(seed)
    files = Files.named(folder, kind)
    for path in (files.data, files.index):
        path.unlink(missing_ok=True)
    with files.create(DISK) as upper:
        for _ in range(rng.randint(0, 12)):
            upper.write_at(rng.randrange(200) * 512, bytes([rng.randrange(256)]) * 512 * rng.randint(1, 40))
        if rng.random() < 0.2:
            upper.seal()
    for path in (files.data, files.index):
        content = path.read_bytes()
        if content and rng.random() < 0.7:
            path.write_bytes(damaged(content, rng))
    try:
        upper = open_upper(files.data, files.index, read_only=rng.random() < 0.3)
    except ObdlabError:
        return
    with WritableStack(None, upper) as stack:
        try:
            read_all_of(stack)
            stack.write_at(0, b"new" * 100)
            stack.flush()
            assert stack.read_at(0, 300) == b"new" * 100
        except ObdlabError:
            return
    with open_upper(files.data, files.index) as again:
        assert again.read_at(0, 300) == b"new" * 100


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**40))
def test_writable_layers(tmp_path: Path, kind: str, seed: int) -> None:
    fuzz_upper(tmp_path, kind, seed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_writable_layers_long(tmp_path: Path, kind: str) -> None:
    for seed in range(10_000):
        fuzz_upper(tmp_path, kind, seed)


@given(st.binary(max_size=600))
def test_structs_from_any_bytes(data: bytes) -> None:
    is_lsmt(data)
    for kind in (Header, Trailer):
        with pytest.raises(FormatError):
            kind.from_bytes(data)
        try:
            kind.from_bytes((LSMT / "c1.data").read_bytes()[:28] + data.ljust(400, b"\0"))
        except FormatError:
            pass
    records = data[: len(data) // 16 * 16]
    assert len(meant_records(records)) == len(decode_segments(records))


class Sparse(Blob):
    """A huge blob that is zero but for its ends."""

    name = "sparse"

    def __init__(self, size: int, start: bytes, end: bytes) -> None:
        self._size, self._start, self._end = size, start, end

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        assert length <= 32 << 20, "asked for more than any layer needs"
        out = bytearray(length)
        for at, part in ((0, self._start), (self._size - len(self._end), self._end)):
            begin, end = max(at, offset), min(at + len(part), offset + length)
            if begin < end:
                out[begin - offset : end - offset] = part[begin - at : end - at]
        return bytes(out)


@pytest.mark.parametrize("records", [128_000_000, 1_000_001, 1_000_000, 2**64 - 1])
def test_claims_do_not_cost_memory(records: int) -> None:
    content = bytearray((LSMT / "c1.empty.lsmt").read_bytes())
    trailer = content[-4096:]
    struct.pack_into("<QQ", trailer, 32, HEADER_SPACE, records)
    for size in (8192, 1 << 40):
        blob = Sparse(size, bytes(content[:4096]), bytes(trailer))
        tracemalloc.start()
        try:
            if records == 1_000_000 and size > 8192:
                assert len(LsmtLayer(blob).index) == 0  # records of zeros mean nothing
            else:
                with pytest.raises(FormatError):
                    LsmtLayer(blob)
            assert tracemalloc.get_traced_memory()[1] < 128 << 20
        finally:
            tracemalloc.stop()


def test_every_record_of_a_log_may_be_wrong(tmp_path: Path) -> None:
    rng = random.Random(5)
    for turn in range(60):
        log = b"".join(
            struct.pack("<QQ", rng.choice((rng.getrandbits(64), rng.randrange(200) | 1 << 50)), rng.getrandbits(5))
            for _ in range(rng.randrange(50))
        )
        (tmp_path / "data").write_bytes((LSMT / "c1.data").read_bytes() + bytes(512 * turn))
        (tmp_path / "index").write_bytes((LSMT / "c1.index").read_bytes() + log)
        try:
            with AppendUpper.open(tmp_path / "data", tmp_path / "index") as upper:
                upper.read_at(0, 1 << 20)
        except FormatError as error:
            assert "points outside" in str(error)
