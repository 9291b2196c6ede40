"""Blobs of registries that are read in place, and files that are sent: the same bytes, and few requests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.blob import MemoryBlob
from obdlab.call import Call
from obdlab.convert.endpoints import registryimages
from obdlab.convert.endpoints.registryimages import _CountedFile, _Recent

PIECE = registryimages._PIECE
DATA = random.Random(3).randbytes(5 * PIECE + 17)


class Counting(MemoryBlob):
    """A blob that remembers which ranges were read."""

    def __init__(self) -> None:
        super().__init__(DATA)
        self.reads: list[tuple[int, int]] = []

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self.reads.append((offset, length))
        return super().read_at(offset, length, call)


@given(st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 2 * PIECE)), max_size=8))
def test_ranges_are_those_of_the_blob(ranges: list[tuple[int, int]]) -> None:
    source = Counting()
    recent = _Recent(source)
    for offset, length in ranges:
        length = min(length, len(DATA) - offset)
        assert recent.read_at(offset, length) == DATA[offset : offset + length]
    assert len(set(source.reads)) == len(source.reads)


def test_the_latest_pieces_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registryimages, "_PIECES", 2)
    source = Counting()
    recent = _Recent(source)
    for number in (0, 1, 0, 2, 0, 1):  # when 2 comes, 1 goes, which was not used last
        assert recent.read_at(number * PIECE, 10) == DATA[number * PIECE :][:10]
        assert len(recent._pieces) <= 2
    assert [offset // PIECE for offset, _ in source.reads] == [0, 1, 2, 1]
    recent.evict(0, 1)
    assert recent.read_at(PIECE, 10) == DATA[PIECE:][:10]
    assert len(source.reads) == 5


def test_what_is_sent_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA[:1000])
    for sizes in ((None,), (-1,), (400, 400, 400), (400, None), (0, -1)):
        counts: list[int] = []
        with _CountedFile(tmp_path / "file", counts.append) as file:
            parts = [file.read(size) for size in sizes]
        assert b"".join(parts) == DATA[:1000]
        assert counts == [len(part) for part in parts]
        assert all(size is None or size < 0 or len(part) <= size for size, part in zip(sizes, parts, strict=True))
