"""Log files of services: root follows no link of another user, and writes to no file that others can change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from obdlab.observe.rotation import RotatingFile
from obdlab.system.ownfiles import own_path

OTHER = 65534


@pytest.fixture
def open_place(tmp_path: Path) -> Path:
    """A directory that everybody may write to, as /tmp."""
    if os.geteuid() != 0:
        pytest.skip("giving files away needs root")
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o1777)
    return place


def run(*words: str | Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "obdlab", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def test_a_service_of_root_follows_no_link_of_another_user(open_place: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (open_place / "log").symlink_to(victim)
    os.lchown(open_place / "log", OTHER, OTHER)
    (open_place / "sub").symlink_to(tmp_path)
    os.lchown(open_place / "sub", OTHER, OTHER)
    for path in (open_place / "log", open_place / "sub" / "victim", open_place / "sub" / "fresh"):
        listen = ("--listen", "127.0.0.1:0", "--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache")
        status, error = run("serve", "exporter", *listen, "--log-file", path)
        (line,) = error.splitlines()
        assert status == 1
        assert line.startswith("obdlab serve exporter: ")
        assert f"symbolic link of user {OTHER}" in line
    assert victim.read_text() == "kept"
    assert not (tmp_path / "fresh").exists()


def test_a_file_of_another_user_is_refused(open_place: Path) -> None:
    theirs = open_place / "theirs"
    theirs.touch()
    os.chown(theirs, OTHER, OTHER)
    with pytest.raises(OSError, match="file can be changed by other users"):
        own_path(theirs)
    os.mkfifo(open_place / "pipe")
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        own_path(open_place / "pipe")


def test_links_of_our_own_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "absolute").symlink_to(tmp_path / "link" / ".." / "real")
    assert own_path(tmp_path / "link" / "log") == (tmp_path / "real" / "log").resolve()
    assert own_path(tmp_path / "absolute" / "a" / ".." / "log") == (tmp_path / "real" / "log").resolve()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels"):
        own_path(tmp_path / "loop" / "log")


def test_a_log_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    path, victim = tmp_path / "log", tmp_path / "victim"
    victim.write_text("kept")
    file = RotatingFile(path, size=1 << 20, count=2)
    file.write(b"one\n")
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels"):
        file.write(b"two\n")
    file.close()
    assert victim.read_text() == "kept"
