"""The installed commands, run as processes, write the bytes that the original's wrote from the same input."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.dropin.running import Tools

GOLDEN = Path(__file__).parents[2] / "golden"
# Without a UUID in the command line, the tool makes a random one.
RANDOM_NAMES = {"l1.nouuid.lsmt", "c1.empty.lsmt", "c0.data", "c1.data"}


class Case(NamedTuple):
    """An entry of a manifest: the original's command, and the files that it wrote."""

    folder: str
    command: str
    outputs: tuple[str, ...]


def _cases() -> list[Case]:
    cases = []
    for folder in ("lsmt", "zfile"):
        for entry in json.loads((GOLDEN / folder / "MANIFEST.json").read_text())["entries"]:
            outputs = tuple(entry.get("files") or [entry["file"]] if "file" in entry or "files" in entry else [])
            if entry.get("cmd", "").startswith("overlaybd-") and not RANDOM_NAMES & set(outputs):
                cases.append(Case(folder, entry["cmd"], outputs))
    return cases


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.outputs[0])
def test_a_command_of_the_manifests_writes_the_same_bytes(case: Case, tools: Tools, tmp_path: Path) -> None:
    for file in (GOLDEN / case.folder).iterdir():
        if file.name not in case.outputs:
            shutil.copy(file, tmp_path)
    name, *words = shlex.split(case.command)
    tools.ok(name, *words)
    for output in case.outputs:
        assert (tmp_path / output).read_bytes() == (GOLDEN / case.folder / output).read_bytes(), output


def test_an_extracted_zfile_is_its_source(tools: Tools, tmp_path: Path) -> None:
    tools.ok("overlaybd-zfile", "-x", GOLDEN / "zfile/input.zstd.16.zfile", "out")
    assert (tmp_path / "out").read_bytes() == (GOLDEN / "zfile/input.bin").read_bytes()


def test_verify_tells_a_sound_zfile_from_a_damaged_one(tools: Tools, tmp_path: Path) -> None:
    content = bytearray((GOLDEN / "zfile/text.lz4.4.zfile").read_bytes())
    for damaged in (False, True):
        if damaged:
            content[700] ^= 1
        (tmp_path / "x").write_bytes(content)
        assert tools.run("overlaybd-zfile", "--verify", "x").returncode == (255 if damaged else 0)
