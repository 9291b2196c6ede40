"""Commands that change layers take their files in one way, and report to machines with --json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import obdlab
from obdlab.cli.main import main
from obdlab.formats.trace import Trace
from obdlab.layers.upper import open_upper
from obdlab.traces.replay import reads_of_disk
from tests.layers.golden import GOLDEN

LAYERS = [str(GOLDEN / "ext4" / f"layer{number}.obd") for number in (1, 2)]
MIB = 1 << 20


def facts(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    assert main([*words, "--json"]) == status, capsys.readouterr().err
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OBDLAB_RUN_DIR", str(tmp_path / "run"))
    return tmp_path


# Data file, then index file: by position everywhere, and by the option of earlier versions.
@pytest.mark.parametrize("files", [["data", "index"], ["data", "--index", "index"]], ids=["position", "option"])
def test_a_layers_life_in_json(files: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = facts(capsys, "layer", "create", *files, "--vsize", "4M")
    assert made == {"data": "data", "index": "index", "size": 4 * MIB}
    with open_upper("data", "index") as upper:
        for number in range(4):
            upper.write_at(0, bytes([number]) * 8192)
    grown = facts(capsys, "layer", "resize", *files, "--vsize", "8M")
    assert grown == {"layer": "data", "size": 8 * MIB, "size_before": 4 * MIB}
    collected = facts(capsys, "layer", "gc", *files)
    assert collected["data"] == "data"
    assert collected["allocated_after"] < collected["allocated_before"]
    output = ["out.obd"] if "--index" not in files else []
    words = [files[0], "out.obd", *files[1:]] if "--index" in files else [*files, *output]
    committed = facts(capsys, "layer", "commit", *words)
    assert committed == {
        "output": "out.obd",
        "data_size": 8192,
        "segments": 1,
        "stored_size": (here / "out.obd").stat().st_size,
    }
    assert facts(capsys, "layer", "seal", *files) == {"data": "data", "segments": 1}


@pytest.mark.parametrize("command", ["create", "commit", "seal", "gc", "resize"])
@pytest.mark.usefixtures("here")
def test_two_index_files_are_refused_everywhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "index", *(["out"] if command == "commit" else []), "--index", "other"]
    words += ["--vsize", "1M"] if command in ("create", "resize") else []
    assert main(["layer", command, *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"obdlab layer {command}: two index files (got index and --index other, wanted one)"


@pytest.mark.usefixtures("here")
def test_written_layers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    merged = facts(capsys, "layer", "merge", *LAYERS, "-o", "merged.obd")
    assert (merged["output"], merged["stored_size"]) == ("merged.obd", Path("merged.obd").stat().st_size)
    Path("disk").write_bytes(b"x" * MIB)
    imported = facts(capsys, "layer", "import", "disk", "imported.obd")
    assert (imported["output"], imported["data_size"]) == ("imported.obd", MIB)


@pytest.mark.usefixtures("here")
def test_traces_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("one").write_bytes(Trace.from_reads([(0, 0, 8192)]).to_bytes())
    Path("other").write_bytes(Trace.from_reads([(0, 4096, 4096), (1, 0, 512)]).to_bytes())
    assert facts(capsys, "trace", "diff", "one", "other", status=1) == [
        {"in": "one", "layer": 0, "begin": 0, "end": 4096},
        {"in": "other", "layer": 1, "begin": 0, "end": 512},
    ]
    assert facts(capsys, "trace", "diff", "one", "one") == []
    with obdlab.open_stack(LAYERS) as disk:
        Path("whole").write_bytes(Trace.from_reads(reads_of_disk(disk, 0, MIB)).to_bytes())
    files = facts(capsys, "trace", "files", "whole", ",".join(LAYERS))
    assert files["elsewhere"] + sum(each["read"] for each in files["files"]) > 0


@pytest.mark.usefixtures("here")
def test_a_host_without_devices_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys, "device", "upgrade") == []
    cleaned = facts(capsys, "cleanup", "--run-dir", "run", "--cache-dir", "cache")
    assert (cleaned["in_use"], cleaned["freed_cache_bytes"]) == ([], 0)
