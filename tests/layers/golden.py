"""The files that the original's tools wrote, and what they decode to."""

from __future__ import annotations

import gzip
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from obdlab.blob import Blob, MemoryBlob

GOLDEN = Path(__file__).parent.parent / "golden"
LSMT = GOLDEN / "lsmt"
TURBO = GOLDEN / "turbooci"


@cache
def manifest(folder: str) -> dict[str, Any]:
    """The MANIFEST.json of a folder of golden files."""
    content: dict[str, Any] = json.loads((GOLDEN / folder / "MANIFEST.json").read_text())
    return content


def entry(name: str) -> dict[str, Any]:
    """The entry of one LSMT file."""
    return next(entry for entry in manifest("lsmt")["entries"] if name in entry.get("files", ()))


def blob(name: str) -> MemoryBlob:
    """An LSMT golden file in memory."""
    return MemoryBlob((LSMT / name).read_bytes(), name)


def turbo_stack(*names: str) -> dict[str, Any]:
    """The entry of a stack of warp layers."""
    return next(entry for entry in manifest("turbooci")["entries"] if entry.get("stack") == list(names))


def warp_file(name: str) -> MemoryBlob:
    """The ZFile of a warp layer in memory."""
    return MemoryBlob((TURBO / f"{name}.ext4.fs.meta").read_bytes(), f"{name}.ext4.fs.meta")


@cache
def target_tar(name: str) -> MemoryBlob:
    """The uncompressed tar that a warp layer points into."""
    if name == "plain.tar":
        return MemoryBlob((TURBO / name).read_bytes(), name)
    return MemoryBlob(gzip.decompress((TURBO / f"{name}.tar.gz").read_bytes()), f"{name}.tar.gz")


def sha256_of(source: Blob, step: int = 1 << 20) -> str:
    """The sum of everything a blob reads as."""
    sum_ = hashlib.sha256()
    for at in range(0, source.size, step):
        sum_.update(source.read_at(at, min(step, source.size - at)))
    return sum_.hexdigest()
