"""Indexes of gzip layers as files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.errors import CorruptBlobError, FormatError, SourceError
from obdlab.layerfiles.gziplayers import describe_index, make_index, verify_index
from obdlab.layers.gzipwriter import SeveralMembersError
from tests.layers.golden import TURBO

GOOD = TURBO / "good.tar.gz"
TWO = TURBO / "twomember.tar.gz"
SPAN = 1 << 20


def test_made_described_and_verified(tmp_path: Path) -> None:
    done: list[int] = []
    facts = make_index(GOOD, tmp_path / "index", span=SPAN, progress=done.append)
    assert (tmp_path / "index").read_bytes() == (TURBO / "good.gzip.meta").read_bytes()
    assert sum(done) == GOOD.stat().st_size
    assert facts == describe_index(TURBO / "good.gzip.meta")
    assert (facts.version, facts.entries, facts.longest_span) == (1, 4, 1287253)
    size = len(gzip.decompress(GOOD.read_bytes()))
    assert sum(verify_index(GOOD, tmp_path / "index")) == facts.uncompressed_size == size


def test_a_layer_that_cannot_be_indexed_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(GOOD.read_bytes()[:-1])
    for layer, error in (
        (TWO, SeveralMembersError),
        (tmp_path / "cut", FormatError),
        (TURBO / "plain.tar", FormatError),
        (tmp_path / "nowhere", SourceError),
    ):
        with pytest.raises(error):
            make_index(layer, tmp_path / "index", span=SPAN, progress=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_several_members_when_asked(tmp_path: Path) -> None:
    facts = make_index(TWO, tmp_path / "index", span=SPAN, several=True, progress=lambda _: None)
    assert facts.several_members
    assert sum(verify_index(TWO, tmp_path / "index")) == 4106240


def test_damage_is_found(tmp_path: Path) -> None:
    data = bytearray(GOOD.read_bytes())
    data[200_000] ^= 1
    (tmp_path / "layer").write_bytes(data)
    with pytest.raises(CorruptBlobError):
        list(verify_index(tmp_path / "layer", TURBO / "good.gzip.meta"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = str(tmp_path / "index")
    words = ["layer", "gzip-index"]
    assert main([*words, "make", str(GOOD), index]) == 0
    assert capsys.readouterr().err == f"{index}: 4 places in 3.9 MiB, 12.6 KiB\n"
    assert main([*words, "inspect", index, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 4
    assert main([*words, "inspect", index]) == 0
    assert "4 places to begin" in capsys.readouterr().out
    assert main([*words, "verify", str(GOOD), index]) == 0
    assert "sound" in capsys.readouterr().err
    assert main([*words, "make", str(GOOD), index]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*words, "make", "--force", "--span-kib", "64", "--json", str(GOOD), index]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] > 4
    assert main([*words, "make", str(TWO), str(tmp_path / "two")]) == 1
    assert "convert the image fully" in capsys.readouterr().err
    assert main([*words, "verify", str(TWO), index]) == 1
    assert "index of another gzip file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "make", "--span-kib", "63", str(GOOD), index])
    assert "from 64 to" in capsys.readouterr().err
