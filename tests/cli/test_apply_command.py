"""``obdlab layer apply``: one tar onto the writable layer of a configuration."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

import obdlab
from obdlab.cli.main import main
from obdlab.convert.compare.listing import list_volume
from obdlab.volumes.ext4.volume import Volume
from tests.convert.goldens import GOLDEN, golden_view, wanted_view


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of the original's lowest layer below an empty writable one."""
    words = ["layer", "create", str(tmp_path / "data"), str(tmp_path / "index"), "--vsize", "1G"]
    assert main(words) == 0
    path = tmp_path / "config.v1.json"
    upper = {"data": str(tmp_path / "data"), "index": str(tmp_path / "index")}
    path.write_text(json.dumps({"lowers": [{"file": str(GOLDEN / "layer1.obd")}], "upper": upper}))
    return path


def test_a_layer_on_the_originals_is_the_originals_next_one(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = (GOLDEN / "layer2.tar").read_bytes()
    (tmp_path / "layer").write_bytes(gzip.compress(tar))
    digest = f"sha256:{hashlib.sha256(tar).hexdigest()}"
    capsys.readouterr()
    assert main(["layer", "apply", str(tmp_path / "layer"), str(config), "--diff-id", digest, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["members"] > 0 < counts["whiteouts"]
    made = str(tmp_path / "layer.obd")
    assert main(["layer", "commit", str(tmp_path / "data"), str(tmp_path / "index"), made]) == 0
    with obdlab.open_stack([GOLDEN / "layer1.obd", made]) as disk:
        assert golden_view(list_volume(Volume(disk))) == wanted_view(2)


def test_another_tar_than_the_named_one_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layer", "apply", str(GOLDEN / "layer2.tar"), str(config), "--diff-id", f"sha256:{'0' * 64}"]
    assert main(words) == 1
    assert "sha256:000" in capsys.readouterr().err
