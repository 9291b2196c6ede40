"""``obdlab install-tools``: what it installs, replaces and removes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.cli.dropin.originals import TOOLS
from obdlab.cli.host import install_tools
from obdlab.cli.main import main

COMMIT = "overlaybd-commit"


def test_it_installs_all_commands_and_removes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "new" / "bin"
    assert main(["install-tools", str(place)]) == 0
    assert {path.name for path in place.iterdir()} == set(TOOLS)
    assert all(path.stat().st_mode & 0o777 == 0o755 for path in place.iterdir())
    assert capsys.readouterr().out.splitlines() == [f"installed {place / name}" for name in TOOLS]
    (place / "anothers").write_text("#!/bin/sh\n")
    assert main(["install-tools", str(place), "--uninstall", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": [str(place / name) for name in TOOLS]}
    assert [path.name for path in place.iterdir()] == ["anothers"]


def test_it_installs_again_over_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["install-tools", str(tmp_path), "--only", COMMIT]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [COMMIT]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "directory"])
def test_what_others_installed_stays_unless_forced(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, elsewhere = tmp_path / "bin" / COMMIT, tmp_path / "theirs"
    theirs.parent.mkdir()
    if kind == "file":
        theirs.write_bytes(b"\x7fELF")
    elif kind == "directory":
        theirs.mkdir()
    else:
        if kind == "link":
            elsewhere.write_text(install_tools.script(COMMIT))
        theirs.symlink_to(elsewhere)
    before = theirs.lstat()
    assert main(["install-tools", str(theirs.parent)]) == 1
    assert str(theirs) in capsys.readouterr().err
    assert [path.name for path in theirs.parent.iterdir()] == [COMMIT]  # nothing else was installed
    assert main(["install-tools", str(theirs.parent), "--uninstall"]) == 0
    assert theirs.lstat() == before
    if kind == "directory":
        assert main(["install-tools", str(theirs.parent), "--force"]) == 1
        assert theirs.is_dir()
        return
    assert main(["install-tools", str(theirs.parent), "--force"]) == 0
    assert install_tools.is_ours(theirs)
    assert not elsewhere.exists() or elsewhere.read_text() == install_tools.script(COMMIT)


def test_without_a_directory_they_go_where_the_original_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_tools, "HOME", tmp_path)
    assert main(["install-tools"]) == 0
    assert (tmp_path / "bin" / COMMIT).exists()
    assert (tmp_path / "snapshotter" / "overlaybd-attacher").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert main(["install-tools", str(tmp_path / "file" / "bin")]) == 1
    assert f"{tmp_path / 'file' / 'bin' / 'overlaybd-create'}: cannot be written" in capsys.readouterr().err


def test_the_commands_need_nothing_of_the_callers_environment(tmp_path: Path) -> None:
    assert main(["install-tools", str(tmp_path), "--only", "overlaybd-create"]) == 0
    (tmp_path / "obdlab.py").write_text("raise SystemExit('the module of another')")
    command = [tmp_path / "overlaybd-create", "d", "i", "1"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["python 3", "p" * 130])
def test_an_interpreter_that_no_first_line_can_name_is_run_by_the_shell(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / name
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert main(["install-tools", str(tmp_path), "--only", "overlaybd-create"]) == 0
    tool = tmp_path / "overlaybd-create"
    assert install_tools.is_ours(tool)
    subprocess.run([tool, "d", "i", "1"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "d").exists()
