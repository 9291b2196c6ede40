"""The golden files are what their manifests say, and their README speaks of what is there."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"
README = (GOLDEN / "README.md").read_text()


@pytest.mark.parametrize("folder", ["zfile", "lsmt", "ext4", "turbooci"])
def test_files_have_their_sums_and_none_is_without_an_entry(folder: str) -> None:
    manifest: dict[str, Any] = json.loads((GOLDEN / folder / "MANIFEST.json").read_text())
    known = {"MANIFEST.json", *(merged["listing"] for merged in manifest.get("merged", {}).values())}
    for entry in manifest["entries"]:
        files = entry.get("files") or [name for name in (entry.get("file"),) if name]
        sums = entry.get("sha256_of_files") or [entry.get("sha256")]
        for name, wanted in zip(files, sums, strict=bool(files)):
            assert hashlib.sha256((GOLDEN / folder / name).read_bytes()).hexdigest() == wanted, name
        known.update(files, (entry[key] for key in ("source", "tar") if key in entry))
        for name in entry.get("stack", ()):
            assert any(GOLDEN.joinpath(folder).glob(f"{name}*")), name
    assert {path.name for path in (GOLDEN / folder).iterdir()} == known


def test_the_readme_names_every_folder_and_no_other_file_than_those_here() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
    here = {path.name for path in GOLDEN.rglob("*")}
    for name in re.findall(r"`([\w.-]+\.(?:bin|json|md))`", README):
        assert name in here, name
    for key in ("cmd", "sha256_of_files", "decoded_sha256", "ops_rule", "seeds", "stack", "merged"):
        assert f"`{key}`" in README
