"""Files and directories that another user might have prepared."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from obdlab.system.ownfiles import check_own_directory, open_own

NOBODY = 65534


def refused(path: Path) -> int | None:
    with pytest.raises(OSError) as caught:
        os.close(open_own(path, os.O_RDWR | os.O_CREAT))
    return caught.value.errno


def test_a_file_of_our_own(tmp_path: Path) -> None:
    fd = open_own(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"x")
    os.close(fd)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    os.close(open_own(tmp_path / "file", os.O_RDONLY))


def test_links_pipes_and_others_files_are_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(victim)
    assert refused(tmp_path / "link") == errno.ELOOP
    (tmp_path / "dangling").symlink_to(tmp_path / "made")
    assert refused(tmp_path / "dangling") == errno.ELOOP
    assert not (tmp_path / "made").exists()
    (tmp_path / "name").hardlink_to(victim)
    assert refused(tmp_path / "name") == errno.EINVAL
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert refused(tmp_path / "pipe") == errno.EINVAL
    with pytest.raises(OSError, match="not a regular file"):
        open_own(tmp_path / "pipe", os.O_RDONLY)  # would wait for a writer
    (tmp_path / "open").touch()
    (tmp_path / "open").chmod(0o622)
    assert refused(tmp_path / "open") == errno.EINVAL
    assert victim.read_bytes() == b"precious"


@pytest.mark.root
def test_what_is_another_users_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.chown(tmp_path / "file", NOBODY, NOBODY)
    assert refused(tmp_path / "file") == errno.EINVAL
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    with pytest.raises(OSError, match=f"owner {NOBODY}"):
        check_own_directory(tmp_path / "theirs")


def test_directories(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with pytest.raises(FileNotFoundError):
        check_own_directory(place)
    place.mkdir(mode=0o700)
    check_own_directory(place)
    for mode in (0o777, 0o1777, 0o770, 0o702):
        place.chmod(mode)
        with pytest.raises(OSError, match="changed by other users"):
            check_own_directory(place)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_own_directory(tmp_path / "file")
