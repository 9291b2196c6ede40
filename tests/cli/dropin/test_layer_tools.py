"""Sealing, committing sealed files and merging, as the original's snapshotter and BuildKit call the tools."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import obdlab
from obdlab.formats.lsmt.layout import RECORD_SIZE
from obdlab.layerfiles.description import describe
from tests.cli.dropin.running import Tools
from tests.layers.golden import LSMT, manifest

DONE = "overlaybd-commit has committed files SUCCESSFULLY\n"


def golden(tools: Tools, *names: str) -> None:
    """Put golden files into the working directory."""
    for name in names:
        shutil.copy(LSMT / name, tools.cwd)


def disk_sum(*paths: Path) -> str:
    """The sum of everything that layers read as."""
    with obdlab.open_stack(paths) as disk:
        return hashlib.sha256(disk.read_at(0, disk.size)).hexdigest()


def test_the_success_of_create_commit_and_merge_is_printed_as_by_the_original(tools: Tools) -> None:
    assert tools.ok("overlaybd-create", "d", "i", "1") == "overlaybd-create has created files SUCCESSFULLY\n"
    done = tools.run("overlaybd-commit", "-z", "d", "i", "o")
    assert (done.stdout, done.stderr) == (DONE, "\n")  # without an upload the digest's line is empty
    done = tools.run("overlaybd-merge", tools.config("c.json", {"file": str(tools.cwd / "o")}), "m")
    assert (done.stdout, done.stderr) == ("", "\n")


def test_a_file_is_sealed_in_place_to_the_originals_layer(tools: Tools) -> None:
    golden(tools, "l1.data", "l1.index")
    done = tools.run("overlaybd-commit", "--seal", "l1.data", "l1.index")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    ours, theirs = (tools.cwd / "l1.data").read_bytes(), (LSMT / "l1.sealed.lsmt").read_bytes()
    layer = describe(tools.cwd / "l1.data").layer
    assert layer is not None
    assert layer.index_offset is not None
    assert layer.index_records is not None
    assert len(ours) == len(theirs)
    # The original's padding behind the index is memory that it did not set; the trailer has a sum of nothing there.
    end = layer.index_offset + layer.index_records * RECORD_SIZE
    assert ours[4096:end] == theirs[4096:end]
    assert ours[-4096:] == theirs[-4096:]


def test_buildkits_call_on_a_sealed_file(tools: Tools) -> None:
    golden(tools, "l1.data", "l1.index")
    tools.ok("overlaybd-commit", "--seal", "l1.data", "l1.index")
    (tools.cwd / "l1.data").rename(tools.cwd / "overlaybd.sealed")
    (tools.cwd / "overlaybd.commit.temp").write_bytes(b"left by an attempt that was killed")
    command = [
        "--commit_sealed",
        tools.cwd / "overlaybd.sealed",
        tools.cwd / "overlaybd.commit.temp",
        "-t",
        "-z",
        "-f",
    ]
    assert tools.ok("overlaybd-commit", *command) == DONE
    made = describe(tools.cwd / "overlaybd.commit.temp")
    assert made.tar is not None
    assert made.zfile is not None
    (wanted,) = [each for each in manifest("lsmt")["entries"] if each.get("files") == ["l1.lz4.lsmt"]]
    assert disk_sum(tools.cwd / "overlaybd.commit.temp") == disk_sum(LSMT / wanted["files"][0])


def test_a_sealed_golden_file_is_committed(tools: Tools) -> None:
    golden(tools, "l2.sealed.lsmt")
    before = (tools.cwd / "l2.sealed.lsmt").read_bytes()
    tools.ok("overlaybd-commit", "--commit_sealed", "l2.sealed.lsmt", "o", "-z", "--compress_threads", "4")
    tools.ok("overlaybd-commit", "--commit_sealed", "l2.sealed.lsmt", "one", "-z")
    assert (tools.cwd / "l2.sealed.lsmt").read_bytes() == before
    assert disk_sum(tools.cwd / "o") == disk_sum(LSMT / "l2.plain.lsmt")


def test_merged_layers_read_as_the_stack(tools: Tools) -> None:
    golden(tools, "l1.lz4.lsmt", "l2.plain.lsmt")
    lowers = [{"file": str(tools.cwd / name)} for name in ("l1.lz4.lsmt", "l2.plain.lsmt")]
    (tools.cwd / "merged").write_bytes(b"replaced, as by the original")
    tools.ok("overlaybd-merge", tools.config("c.json", *lowers), "merged")
    assert disk_sum(tools.cwd / "merged") == disk_sum(LSMT / "l1.lz4.lsmt", LSMT / "l2.plain.lsmt")
    tools.ok("overlaybd-merge", "--compress=false", tools.cwd / "c.json", "plain")
    assert disk_sum(tools.cwd / "plain") == disk_sum(tools.cwd / "merged")


def test_a_writable_layer_is_merged_too(tools: Tools) -> None:
    golden(tools, "l1.lz4.lsmt", "l2.data", "l2.index")
    tools.ok(
        "overlaybd-merge", tools.config("c.json", {"file": str(tools.cwd / "l1.lz4.lsmt")}, upper="l2"), "merged"
    )
    assert disk_sum(tools.cwd / "merged") == disk_sum(LSMT / "l1.lz4.lsmt", LSMT / "l2.plain.lsmt")


def test_a_cut_layer_is_refused_and_nothing_is_made(tools: Tools) -> None:
    (tools.cwd / "cut").write_bytes((LSMT / "l1.lz4.lsmt").read_bytes()[:-2000])
    done = tools.run("overlaybd-merge", tools.config("c.json", {"file": str(tools.cwd / "cut")}), "merged")
    assert done.returncode == 255
    assert "cut" in done.stderr
    assert not (tools.cwd / "merged").exists()
    assert json.loads((tools.cwd / "c.json").read_text())["lowers"]


def test_help_ends_well(tools: Tools) -> None:
    for path in sorted(tools.bin.iterdir()):
        if path.name != "ctr":
            assert tools.ok(path.name, "--help").startswith(f"usage: {path.name} "), path.name
