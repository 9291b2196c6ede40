"""``obdlab image inspect`` on golden files: table, JSON, verification."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from obdlab.cli.main import main
from obdlab.layers.upper import SparseUpper
from tests.layers.golden import GOLDEN, LSMT, manifest


def run(*arguments: str | Path) -> int:
    return main(["layer", "inspect", *map(str, arguments)])


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert run("--json", *arguments) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_json_of_a_wrapped_compressed_layer(capsys: pytest.CaptureFixture[str]) -> None:
    path = LSMT / "l1.lz4tar.lsmt"
    (file,) = run_json(capsys, path)["files"]
    assert file["path"] == str(path)
    assert file["size"] == 214_528
    assert file["tar"] == {"content_offset": 1536, "content_size": 211_952}
    zfile = file["zfile"]
    assert zfile["stored_size"] == 211_952
    assert zfile["ratio"] == round(211_952 / zfile["original_size"], 4)
    assert (zfile["algorithm"], zfile["block_size"], zfile["block_crcs"]) == ("lz4", 4096, True)
    layer = file["layer"]
    assert layer["kind"] == "committed layer"
    assert layer["virtual_size"] == 1 << 20
    assert layer["uuid"] == "11111111-1111-4111-8111-111111111111"
    assert layer["user_tag"] == "layer 1 lz4tar"
    assert (layer["header_flags"], layer["trailer_flags"]) == (7, 6)
    # By the operations that made it: what was written last, and what was punched.
    sectors = {"W": set[int](), "T": set[int]()}
    for line in (LSMT / "l1.ops").read_text().splitlines():
        kind, begin, count, _ = line.split()
        touched = range(int(begin), int(begin) + int(count))
        sectors["W"].difference_update(touched)
        sectors["T"].difference_update(touched)
        sectors[kind].update(touched)
    assert layer["mapped_size"] == 512 * len(sectors["W"])
    assert layer["zeroed_size"] == 512 * len(sectors["T"])


@pytest.mark.parametrize(
    ("name", "kind", "sealed"),
    [
        ("l1.plain.lsmt", "committed layer", True),
        ("l1.sealed.lsmt", "layer sealed in place", True),
        ("c1.empty.lsmt", "committed layer", True),
        ("l1.data", "writable layer, append-only", False),
        ("c0.data", "writable layer, append-only", False),
        ("l1.index", "index of a writable layer", False),
    ],
)
def test_kinds_of_lsmt_files(capsys: pytest.CaptureFixture[str], name: str, kind: str, sealed: bool) -> None:
    (file,) = run_json(capsys, LSMT / name)["files"]
    assert file["zfile"] is None
    assert file["layer"]["kind"] == kind
    assert (file["layer"]["segments"] is not None) == sealed


def test_sparse_writable_layer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "data"
    with SparseUpper.create(path, 1 << 30, user_tag="mine") as upper:
        upper.write_at(8192, bytes(4096))
    (file,) = run_json(capsys, path)["files"]
    assert file["layer"]["kind"] == "writable layer, sparse"
    assert file["layer"]["virtual_size"] == 1 << 30
    assert file["layer"]["user_tag"] == "mine"


@pytest.mark.parametrize("entry", manifest("zfile")["entries"], ids=lambda entry: entry["file"])
def test_zfiles_without_a_layer_inside(capsys: pytest.CaptureFixture[str], entry: dict[str, Any]) -> None:
    document = run_json(capsys, "--verify", GOLDEN / "zfile" / entry["file"])
    assert document["verified"] is True
    assert document["files"][0]["zfile"]["original_size"] == entry["decoded_size"]
    assert document["files"][0]["layer"] is None


def test_stack(capsys: pytest.CaptureFixture[str]) -> None:
    stack = run_json(capsys, LSMT / "l1.plain.lsmt", LSMT / "l2.lz4.lsmt")["stack"]
    assert stack["layers"] == 2
    assert stack["virtual_size"] == 1 << 20
    assert stack["broken_parent_links"] == []
    top = run_json(capsys, LSMT / "l2.lz4.lsmt")["files"][0]["layer"]
    assert stack["visible_sizes"][1] == top["mapped_size"], "nothing hides the top"
    upside_down = run_json(capsys, LSMT / "l2.lz4.lsmt", LSMT / "l1.plain.lsmt")["stack"]
    assert upside_down["broken_parent_links"] == [1]
    mixed = run_json(capsys, LSMT / "l1.plain.lsmt", LSMT / "l2.data")
    assert "stack" not in mixed


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--verify", *(GOLDEN / "ext4" / f"layer{number}.obd" for number in (1, 2))) == 0
    out = capsys.readouterr().out
    assert re.search(r"layer1\.obd: 1327104 B \(1\.3 MiB\)\n  tar\n    content offset +1536\n", out)
    assert re.search(r"    algorithm +lz4\n    block size +4096 B \(4\.0 KiB\)\n", out)
    assert re.search(r"    virtual size +1073741824 B \(1\.0 GiB\)\n", out)
    assert "verified: all 934 blocks match their CRC" in out
    assert re.search(r"stack of 2 layers: 1073741824 B .*\n    1 +\S+ B .* visible .*layer2\.obd\n    0 ", out)


def test_verify_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((GOLDEN / "ext4" / "layer1.obd").read_bytes())
    data[700_000] ^= 0x10
    path = tmp_path / "layer"
    path.write_bytes(data)
    assert run(path) == 0
    assert run("--verify", path) == 1
    assert re.search(rf"^obdlab layer inspect: {path}: CRC of ZFile block", capsys.readouterr().err, re.MULTILINE)


def test_verify_compares_header_and_trailer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The trailer of another file: sound in itself, but not this one's.
    data = bytearray((LSMT / "l1.lz4.lsmt").read_bytes())
    data[-512:] = (LSMT / "l2.lz4.lsmt").read_bytes()[-512:]
    path = tmp_path / "layer"
    path.write_bytes(data)
    assert run(path) == 0, "readers do not need it"
    assert run("--verify", path) == 1
    assert "trailer of the ZFile contradicts its header in index_offset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (GOLDEN / "zfile" / "input.bin", "input.bin: neither a ZFile nor an LSMT file"),
        (GOLDEN / "zfile" / "empty.bin", "empty.bin: neither a ZFile nor an LSMT file"),
        (GOLDEN / "nowhere", "nowhere: cannot open"),
        (GOLDEN / "ext4" / "layer1.tar", "first entry is not a file"),
    ],
)
def test_other_files_are_named_after_the_good_ones(
    path: Path, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [GOLDEN / "ext4" / "layer1.obd", GOLDEN / "ext4" / "layer2.obd"]
    assert run(good[0], path, good[1]) == 1
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if "layer" in line and line[0] != " "] == [
        f"{good[0]}: 1327104 B (1.3 MiB)",
        f"{good[1]}: 190464 B (186.0 KiB)",
    ], "and no stack, of which one layer is missing"
    (error,) = printed.err.splitlines()
    assert error.startswith("obdlab layer inspect: ")
    assert message in error
    assert run("--json", "--verify", good[0], path) == 1
    document = json.loads(capsys.readouterr().out)
    assert [file["path"] for file in document["files"]] == [str(good[0])]
    assert message in document["errors"][0]
    assert "verified" not in document
