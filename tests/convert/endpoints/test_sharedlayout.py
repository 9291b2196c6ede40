"""OCI layout directories that several processes write at once, or that a kill or a loss of power left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from obdlab.convert.endpoints import layout as layout_module
from obdlab.convert.endpoints.layout import REF_NAME, ImageLayout
from obdlab.convert.endpoints.layoutimages import LayoutDestination
from obdlab.errors import SourceError
from obdlab.formats import oci

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(b"{}"), 2)


def tags(root: Path) -> list[str]:
    return sorted(entry.annotations[REF_NAME] for entry in ImageLayout(root).index().manifests)


def test_several_at_once_lose_no_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, started = ImageLayout.index, threading.Barrier(8)

    def slow(self: ImageLayout) -> oci.Index:
        found = index(self)
        time.sleep(0.01)
        return found

    def store(number: int) -> None:
        started.wait(30)
        destination = LayoutDestination(tmp_path / "new", f"v{number}")
        destination.put_bytes(MANIFEST, b"{}")
        destination.put_manifest(MANIFEST, b"{}")

    monkeypatch.setattr(ImageLayout, "index", slow)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store, range(8)))
    assert tags(tmp_path / "new") == [f"v{number}" for number in range(8)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["blobs", "index.json", "oci-layout"]


@pytest.mark.parametrize("left", [["blobs/"], ["blobs/sha256/"], ["blobs/sha256/", ".new-abc"]])
def test_a_layout_that_a_kill_left_half_made_is_finished(left: list[str], tmp_path: Path) -> None:
    for name in left:
        if name.endswith("/"):
            (tmp_path / name).mkdir(parents=True)
        else:
            (tmp_path / name).touch()
    ImageLayout.create(tmp_path).set_tag("a", MANIFEST)
    assert tags(tmp_path) == ["a"]
    assert json.loads((tmp_path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}


def test_an_index_without_a_mark_is_kept(tmp_path: Path) -> None:
    ImageLayout.create(tmp_path).set_tag("a", MANIFEST)
    (tmp_path / "oci-layout").unlink()
    ImageLayout.create(tmp_path).set_tag("b", MANIFEST)
    assert tags(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("names", [["index.json"], [".new-abc"], ["blobs", "precious"]])
def test_other_directories_are_not_taken_for_half_made_layouts(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match="neither empty nor an OCI layout"):
        ImageLayout.create(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_lock_that_another_process_keeps_is_an_error_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = ImageLayout.create(tmp_path / "x")
    monkeypatch.setattr(layout_module, "_LOCK_WAIT_S", 0.02)
    descriptor = os.open(tmp_path / "x", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match="locked by another process") as caught:
            layout.set_tag("a", MANIFEST)
        assert caught.value.temporary
    finally:
        os.close(descriptor)
    layout.set_tag("a", MANIFEST)
    assert tags(tmp_path / "x") == ["a"]


def test_a_file_system_without_locks_has_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = errno.ENOLCK

    def refused(descriptor: int, operation: int) -> None:
        raise OSError(wrong, os.strerror(wrong))

    monkeypatch.setattr("obdlab.system.locks.fcntl.flock", refused)
    layout = ImageLayout.create(tmp_path / "x")
    layout.set_tag("a", MANIFEST)
    assert tags(tmp_path / "x") == ["a"]
    wrong = errno.EIO
    with pytest.raises(SourceError, match="cannot lock it: Input/output error"):
        layout.set_tag("b", MANIFEST)


def test_a_blob_of_a_wrong_size_is_replaced(tmp_path: Path) -> None:
    layout = ImageLayout.create(tmp_path / "x")
    (tmp_path / "blob").write_bytes(b"content")
    digest = oci.digest_of(b"content")
    assert layout.add_file(digest, tmp_path / "blob")
    os.truncate(layout.blob_path(digest), 3)
    assert layout.add_file(digest, tmp_path / "blob")
    assert layout.blob_path(digest).read_bytes() == b"content"
    assert not layout.add_file(digest, tmp_path / "blob")


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ImageLayout.create(tmp_path / "x")
    fsync, synced = os.fsync, []

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_size, layout.blob_path(MANIFEST.digest).exists()))

    monkeypatch.setattr(os, "fsync", noted)
    layout.add_bytes(MANIFEST.digest, b"{}")
    assert synced == [(2, False)]
    assert layout.blob_path(MANIFEST.digest).read_bytes() == b"{}"
