"""Golden ZFiles, and ZFiles made in memory."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from obdlab.layers.zfile import ZFileWriter

GOLDEN = Path(__file__).parents[1] / "golden"
ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "zfile" / "MANIFEST.json").read_text())["entries"]


def golden(name: str) -> bytes:
    return (GOLDEN / "zfile" / name).read_bytes()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compress(data: bytes, block_size: int = 4096, algorithm: str = "lz4", **options: bool) -> bytes:
    out = io.BytesIO()
    with ZFileWriter(out, block_size, algorithm, **options) as writer:
        writer.write(data)
    return out.getvalue()


def quadratic(length: int) -> bytes:
    """The 10,000 bytes (by their length) that the original's tools were given: byte i is (i * i >> 3) & 255."""
    return bytes((i * i >> 3) & 255 for i in range(length))
