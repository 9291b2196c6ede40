"""Compression by magic."""

from __future__ import annotations

import bz2
import gzip
import lzma

import pytest
import zstandard

from obdlab.formats.compression import MAGIC_SIZE, compression_of


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (gzip.compress(b"", mtime=0), "gzip"),
        (zstandard.compress(b""), "zstd"),
        (b"\x50\x2a\x4d\x18\0\0\0\0", "zstd"),
        (b"\x5f\x2a\x4d\x18\0\0\0\0", "zstd"),
        (b"\x60\x2a\x4d\x18\0\0\0\0", ""),
        (lzma.compress(b""), "xz"),
        (bz2.compress(b""), "bzip2"),
        (b"etc/passwd", ""),
        (bytes(512), ""),
        (b"", ""),
        (b"\x1f", ""),
    ],
)
def test_magics(data: bytes, wanted: str) -> None:
    assert compression_of(data[:MAGIC_SIZE]) == wanted
