"""Files of writable layers: locks, permissions, holes, and use after closing."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from obdlab.errors import OutOfRangeError, SourceError
from obdlab.layers.layerfile import LayerFile, sync_directory

if TYPE_CHECKING:
    from pathlib import Path

CREATE = os.O_RDWR | os.O_CREAT


@pytest.mark.parametrize("shared", [False, True])
def test_the_error_names_the_process_that_holds_the_lock(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "layer"
    path.touch()
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print('locked', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([sys.executable, "-c", code, str(path)], text=True, **pipes) as holder,  # type: ignore[call-overload]
        LayerFile(path, os.O_RDWR) as file,
    ):
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(SourceError, match=rf"in use by another opener: process {holder.pid} \(python") as caught:
            file.lock(shared=shared)
        assert caught.value.temporary
        holder.communicate("\n", timeout=30)
        file.lock(shared=shared)


def test_readers_lock_out_writers_only(tmp_path: Path) -> None:
    with LayerFile(tmp_path / "layer", CREATE) as one, LayerFile(tmp_path / "layer", os.O_RDWR) as other:
        one.lock(shared=True)
        other.lock(shared=True)
        with pytest.raises(SourceError, match=f"process {os.getpid()}"):
            one.lock()


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o001, 0o4711])
def test_permissions_are_taken_over_bit_by_bit(tmp_path: Path, mode: int) -> None:
    with LayerFile(tmp_path / "old", CREATE) as old, LayerFile(tmp_path / "new", CREATE) as new:
        os.chmod(tmp_path / "old", mode)
        new.take_after(old)
    before, after = (tmp_path / "old").stat(), (tmp_path / "new").stat()
    assert (before.st_mode, before.st_uid, before.st_gid) == (after.st_mode, after.st_uid, after.st_gid)


def test_a_closed_file_is_refused(tmp_path: Path) -> None:
    file = LayerFile(tmp_path / "layer", CREATE)
    file.close()
    file.close()
    for call in (lambda: file.size, lambda: file.read_at(0, 0), file.sync, lambda: file.resize(5), file.lock):
        with pytest.raises(SourceError, match="layer file is closed"):
            call()


def test_holes_are_no_data(tmp_path: Path) -> None:
    with LayerFile(tmp_path / "layer", CREATE) as file:
        file.resize(1 << 20)
        assert list(file.data_extents(0, 1 << 20)) == []
        file.write_at(65536, b"d" * 65536)
        file.write_at(3 * 65536, b"d" * 65536)
        assert list(file.data_extents(0, 1 << 20)) == [(65536, 131072), (196608, 262144)]
        assert list(file.data_extents(70_000, 200_000)) == [(70_000, 131072), (196608, 200_000)]
        assert list(file.data_extents(0, 65536)) == []
        file.punch_hole(65536, 65536)
        assert list(file.data_extents(0, 1 << 20)) == [(196608, 262144)]
        assert file.read_at(65536, 10) == bytes(10)
        assert file.allocated_size == 65536
        assert file.size == 1 << 20
        with pytest.raises(OutOfRangeError):
            file.read_at((1 << 20) - 5, 6)


def test_a_renamed_file_is_found_by_its_new_name(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(b"before")
    with LayerFile(tmp_path / "new", CREATE) as file:
        file.write_at(0, b"after")
        file.rename(str(tmp_path / "layer"))
        assert file.name == str(tmp_path / "layer")
        file.sync()
    assert (tmp_path / "layer").read_bytes() == b"after"
    assert not (tmp_path / "new").exists()


def test_directories_that_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sync_directory("a name without a directory")
    with pytest.raises(SourceError, match="flushing the directory failed"):
        sync_directory(str(tmp_path / "missing" / "file"))
