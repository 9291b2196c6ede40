"""Copies have the data and the holes of their originals."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from obdlab.errors import SourceError
from obdlab.system import sparsecopy
from obdlab.system.sparsecopy import copy_sparse

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("cloned", [True, False])
def test_data_and_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloned: bool) -> None:
    if not cloned:
        monkeypatch.setattr(sparsecopy, "_FICLONE", 0)
    monkeypatch.setattr(sparsecopy, "_PIECE", 5000)
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        for at, data in ((0, b"begin"), (1 << 20, os.urandom(70_000)), (3 << 20, bytes(8192))):
            file.seek(at)
            file.write(data)
        file.truncate(8 << 20)
    copy_sparse(source, target, 60)
    assert target.read_bytes() == source.read_bytes()
    assert sparsecopy._extents(os.open(target, os.O_RDONLY)) == sparsecopy._extents(os.open(source, os.O_RDONLY))
    assert target.stat().st_blocks <= source.stat().st_blocks + 16


def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    with pytest.raises(SourceError, match="source"):
        copy_sparse(source, tmp_path / "one", 60)
    source.write_bytes(bytes(100))
    (tmp_path / "there").touch()
    with pytest.raises(SourceError, match="exists"):
        copy_sparse(source, tmp_path / "there", 60)
    monkeypatch.setattr(sparsecopy, "_FICLONE", 0)
    with pytest.raises(SourceError, match="longer than"):
        copy_sparse(source, tmp_path / "two", -1)
