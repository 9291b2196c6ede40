"""The gc command."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.layers.append import AppendUpper
from obdlab.layers.upper import SparseUpper


def test_gc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, index = tmp_path / "data", tmp_path / "index"
    with AppendUpper.create(data, index, 1 << 20) as upper:
        for turn in range(300):
            upper.write_at(0, bytes([turn % 256]) * 65536)
    assert main(["layer", "gc", str(data), str(index)]) == 0
    size = data.stat().st_blocks * 512
    assert size <= 2 * 69632
    printed = capsys.readouterr().out
    assert printed.startswith(f"{data}: {size} bytes on disk (")
    assert printed.endswith(" freed, 0 moved), 1 index records (300 before)\n")
    with AppendUpper.open(data, index) as upper:
        assert upper.read_at(0, 65536) == bytes([299 % 256]) * 65536
        assert main(["layer", "gc", str(data), str(index)]) == 1
    assert "in use by another opener" in capsys.readouterr().err


def test_gc_of_a_sparse_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SparseUpper.create(tmp_path / "data", 1 << 20).close()
    assert main(["layer", "gc", str(tmp_path / "data"), str(tmp_path / "index")]) == 0
    assert "nothing to collect" in capsys.readouterr().out
