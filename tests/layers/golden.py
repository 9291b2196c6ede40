"""The files that the original's tools wrote, and what they decode to."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from obdlab.blob import Blob, MemoryBlob

GOLDEN = Path(__file__).parent.parent / "golden"
LSMT = GOLDEN / "lsmt"


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


def sha256_of(source: Blob, step: int = 1 << 20) -> str:
    """The sum of everything a blob reads as."""
    sum_ = hashlib.sha256()
    for at in range(0, source.size, step):
        sum_.update(source.read_at(at, min(step, source.size - at)))
    return sum_.hexdigest()
