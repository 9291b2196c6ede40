"""What the layers that the original converted hold, in a form that a listing of ours can be compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obdlab.convert.compare.listing import TreeEntry

GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"


def golden_view(listing: Mapping[str, TreeEntry]) -> dict[str, list[Any]]:
    """Return what of a listing can be compared with :func:`wanted_view`."""
    return {"/" if path == "." else path: _got(entry) for path, entry in listing.items()}


def wanted_view(depth: int) -> dict[str, list[Any]]:
    """Return what the first ``depth`` of the original's layers hold, mounted."""
    entries = json.loads((GOLDEN / f"expected.m{depth}.json").read_text())
    return {entry["path"]: _wanted(entry) for entry in entries}


def _got(entry: TreeEntry) -> list[Any]:
    xattrs = {name: value.hex() for name, value in entry.xattrs if not name.startswith("trusted.")}
    seen = [oct(entry.mode), entry.uid, entry.gid, entry.mtime_ns // 10**9, entry.sha256, entry.rdev, xattrs]
    return [*seen, bool(entry.linked_to)]


def _wanted(entry: dict[str, Any]) -> list[Any]:
    rdev = tuple(entry["rdev"]) if "rdev" in entry else None
    seen = [entry[key] for key in ("mode", "uid", "gid", "mtime")]
    # The original also sets what is trusted.*, containerd does not.
    xattrs = {name: value for name, value in entry.get("xattrs_hex", {}).items() if not name.startswith("trusted.")}
    return [*seen, entry.get("sha256", ""), rdev, xattrs, "hardlink_group" in entry]
