"""A change of the installed code is noticed, by whom it is looked for in a forked child, too."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from obdlab.server.installed import InstalledCode
from obdlab.system import abi


@pytest.fixture
def package(tmp_path: Path) -> Path:
    top = tmp_path / "package"
    (top / "room" / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "room/__init__.py", "room/code.py"):
        (top / name).write_text("x = 1\n")
    return top


def written_in_place(top: Path) -> None:
    (top / "room/code.py").write_text("x = 22\n")


def replaced(top: Path) -> None:
    (top / "new").write_text("x = 33\n")
    os.replace(top / "new", top / "room/code.py")


def added(top: Path) -> None:
    (top / "other").mkdir()
    (top / "other/code.py").write_text("")


def removed(top: Path) -> None:
    (top / "room/code.py").unlink()


def touched(top: Path) -> None:
    os.utime(top / "room/code.py", (1, 1))


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("change", [written_in_place, replaced, added, removed, touched, shutil.rmtree])
def test_changes(
    package: Path, change: Callable[[Path], None], watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not watched:

        def none_left() -> int:
            raise OSError(24, "none left")

        monkeypatch.setattr(abi, "inotify_init", none_left)
    code = InstalledCode(package)
    assert not code.changed()
    change(package)
    assert code.changed()
    assert code.changed()
    assert InstalledCode(package).digest != code.digest
    code.close()
    assert code.changed()


def test_what_is_no_code_changes_nothing(package: Path) -> None:
    code = InstalledCode(package)
    (package / "room/__pycache__/code.cpython-311.pyc").write_bytes(b"x")
    (package / "room/notes.txt").write_text("x")
    assert not code.changed()
    assert InstalledCode(package).digest == code.digest


def test_a_forked_child_sees_it(package: Path) -> None:
    code = InstalledCode(package)
    written_in_place(package)
    pid = os.fork()
    if pid == 0:
        os._exit(code.changed())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
