"""What ``obdlab device mount`` says of arguments that name nothing it could mount, or no place to mount it."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.cli.sources import _may_be_a_path
from obdlab.registry.errors import RegistryError

LAYER = str(Path(__file__).parents[1] / "golden" / "ext4" / "layer1.obd")


def failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the only line of the failed command's error."""
    places = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["device", "mount", *map(str, arguments), *places]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("obdlab device mount: ")
    return line


def test_target_is_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "file"
    target.write_text("mine")
    assert f"{target}: not a directory" in failure(tmp_path, capsys, LAYER, target)
    assert "cannot make the directory: Not a directory" in failure(tmp_path, capsys, LAYER, target / "below")
    assert target.read_text() == "mine"
    assert not list(tmp_path.glob("run/*/*")), "no configuration is kept of what was not mounted"


def test_what_looks_like_a_path_is_also_missed_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "127.0.0.1:1/layers/none.obd"  # a port that nobody listens on
    line = failure(tmp_path, capsys, name, tmp_path / "mnt")
    assert f"{name}: no such file, and as the reference of an image: 127.0.0.1:1/layers/none.obd:latest: " in line
    line = failure(tmp_path, capsys, "Layers/none.obd", tmp_path / "mnt")
    assert "no such file, and as the reference of an image: " in line
    line = failure(tmp_path, capsys, "127.0.0.1:1/image", tmp_path / "mnt", "--timeout", "1")
    assert "no such file" not in line
    line = failure(tmp_path, capsys, "a.example/b", "none.obd", tmp_path / "mnt")
    assert line.endswith("no such file: a.example/b, none.obd)")
    assert not (tmp_path / "mnt").exists()


def test_a_registry_that_is_down_is_waited_for_until_the_deadline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = iter(["refused", "refused", "no such image"])
    monkeypatch.setattr("obdlab.cli.sources._PAUSE_S", 0.0)

    def fetch(*_: object, **__: object) -> None:
        what = next(tries)
        raise RegistryError(what, temporary=what == "refused")

    monkeypatch.setattr("obdlab.image.from_manifest.fetch_config", fetch)
    assert main(["device", "attach", "127.0.0.1:1/image", "--run-dir", str(tmp_path / "run")]) == 1
    first, last = capsys.readouterr().err.splitlines()
    assert first == "refused; waiting for the registry, 150 s more at most"
    assert last == "obdlab device attach: no such image"


@pytest.mark.parametrize("name", ["a.obd", "h.example/a.obd", "config.v1.json", "x/./y", "layer", "layers/bottom"])
def test_names_that_may_be_paths(name: str) -> None:
    assert _may_be_a_path(name)


@pytest.mark.parametrize("name", ["localhost/a", "h.example/a:1", "h:5000/a", "[::1]:5000/a@sha256:" + 64 * "0"])
def test_names_that_can_only_be_references(name: str) -> None:
    assert not _may_be_a_path(name)
