"""Roots of the original snapshotter: a bolt file that a real containerd wrote, taken over with all that it names."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.containerd.client import Containerd
from obdlab.contrib.original_root.bolt import BoltFile, Bucket
from obdlab.contrib.original_root.importing import ImportRootError, read_snapshots, take_over
from obdlab.errors import FormatError, ObdlabError
from obdlab.snapshotter.errors import FailedPreconditionError, NotFoundError
from obdlab.snapshotter.layout import Layout, RootError
from obdlab.snapshotter.store import Kind, Usage
from obdlab.snapshotter.writable import LABEL_WRITABLE, Mode, make_upper
from obdlab.system import abi, mount
from tests import capabilities
from tests.containerd.host import running_containerd
from tests.snapshotter import imagefiles
from tests.snapshotter.mounting import mounted
from tests.snapshotter.test_core import open_snapshotter
from tests.snapshotter.test_writable import Root
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.containerd

_MS_BIND = 4096
NOTE = "containerd.io/snapshot/note"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root as the original leaves it: containerd's overlayfs keeps the same metadata in the same directories."""
    capabilities.require("containerd")
    directory = tmp_path_factory.mktemp("c")
    with (
        running_containerd(directory) as host,
        Containerd(host.address, "ns") as client,
        client.lease(expire_s=600) as lease,
    ):
        names = (("containerd-namespace", "ns"), ("containerd-lease", lease.lease_id))
        wire = WireSnapshotter(host.address, "overlayfs", *names)
        for number in range(80):  # enough for branch pages
            wire.prepare(f"key{number}", f"plain{number - 1}" if number else "", {NOTE: str(number)})
            if number == 0:
                fs = host.root / "io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs"
                (fs / "file").write_text("kept")
            wire.commit(f"plain{number}", f"key{number}", {NOTE: "n" * number, "containerd.io/snapshot/b": "c"})
        wire.view("view", "plain79", {})
        wire.prepare("image-key", "", {})
        wire.commit("image", "image-key", {})
        wire.prepare("container", "image", {})
        wire.prepare("own", "image", {LABEL_WRITABLE: "dir"})
        wire.close()
    return directory / "root/io.containerd.snapshotter.v1.overlayfs"


@pytest.fixture
def original(written: Path, tmp_path: Path) -> Path:
    root = tmp_path / "root"
    shutil.copytree(written, root)
    return root


def ids_of(root: Path) -> dict[str, int]:
    with BoltFile(root / "metadata.db") as file:
        return {snapshot.key.split("/")[-1]: snapshot.id for snapshot in read_snapshots(file)[0]}


def make_image(root: Path, *, writable: bool) -> None:
    """What the original puts beside an image that its client downloaded, and a container's device on it."""
    ids = ids_of(root)
    layers, _ = imagefiles.golden_layers()
    homes = {name: root / "snapshots" / str(ids[name]) for name in ("image", "own")}
    with tarfile.open(fileobj=io.BytesIO(layers[0])) as archive:
        archive.extractall(homes["image"] / "fs", filter="data")
    lower = {"dir": f"{homes['image']}/fs"}
    for name in ("image", "own") if writable else ("image",):
        block = homes[name] / "block"
        (block / "mountpoint").mkdir(parents=True)
        (block / "init-debug.log").touch()
        upper = {"index": f"{block}/writable_index", "data": f"{block}/writable_data"} if name == "own" else {}
        values = {"repoBlobUrl": "", "lowers": [lower], "upper": upper, "resultFile": f"{block}/init-debug.log"}
        (block / "config.v1.json").write_text(json.dumps(values))


def test_everything_is_taken_over(original: Path, tmp_path: Path) -> None:
    with BoltFile(original / "metadata.db") as file:
        before = {snapshot.key: snapshot for snapshot in read_snapshots(file)[0]}
    before_bytes = (original / "metadata.db").read_bytes()
    snapshotter = open_snapshotter(tmp_path)
    after = {snapshot.key: snapshot for snapshot in snapshotter.walk()}
    assert after == before
    assert len(after) == 84
    name = next(key for key in after if key.endswith("/plain7"))
    assert after[name].kind is Kind.COMMITTED
    assert after[name].parent.endswith("/plain6")
    assert after[name].labels == {NOTE: "n" * 7, "containerd.io/snapshot/b": "c"}
    assert after[name].created_ns > 10**18
    assert after[name].usage.inodes > 0
    assert after[name].usage != Usage()
    # Files stay, ids go on after all that were ever given out, and the original's metadata is as it was.
    assert (original / "snapshots/1/fs/file").read_text() == "kept"
    snapshotter.prepare("next", name, {})
    assert snapshotter.stat("next").id == 85
    assert (original / "metadata.db").read_bytes() == before_bytes
    snapshotter.close()
    again = open_snapshotter(tmp_path)
    assert len(again.walk()) == 85
    again.close()


@pytest.mark.kernel
def test_images_and_containers_go_on(original: Path, tmp_path: Path) -> None:
    capabilities.require("kernel")
    make_image(original, writable=True)
    root = Root(tmp_path)
    try:
        own = original / "snapshots" / str(ids_of(original)["own"]) / "block"
        make_upper(own / "writable_data", own / "writable_index", 0, sparse=False, make_ext4=False)
        with root.opened() as snapshotter:
            keys = {snapshot.key.split("/")[-1]: snapshot.key for snapshot in snapshotter.walk()}
            with mounted(snapshotter.mounts(keys["container"]), tmp_path / "one") as rootfs:
                assert (rootfs / "abs").exists()
                (rootfs / "new").write_text("x")
            with mounted(snapshotter.mounts(keys["own"]), tmp_path / "two") as rootfs:
                assert (rootfs / "abs").exists()
                (rootfs / "new").write_text("y")
            snapshotter.commit("layer", keys["own"], {})
            for key in (keys["container"], "layer", keys["image"]):
                snapshotter.remove(key)
                with pytest.raises(NotFoundError):
                    snapshotter.stat(key)
    finally:
        root.lose_mounts()


def test_a_layer_whose_commit_was_cut_off_is_not_deleted(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The original seals the data by renaming it, before it notes the commit."""
    make_image(original, writable=True)
    home = original / "snapshots" / str(ids_of(original)["own"])
    sealed = home / "fs/overlaybd.sealed"
    make_upper(home / "block/writable_data", home / "block/writable_index", 0, sparse=False, make_ext4=False)
    (home / "block/writable_data").rename(sealed)
    data = sealed.read_bytes()
    snapshotter = open_snapshotter(tmp_path)
    (key,) = (snapshot.key for snapshot in snapshotter.walk() if snapshot.key.endswith("/own"))
    assert f"not recovered: {sealed}: the only copy of what the container wrote" in caplog.text
    with pytest.raises(FailedPreconditionError, match="the only copy of what the container wrote"):
        snapshotter.commit("layer", key, {})
    snapshotter.close()
    assert sealed.read_bytes() == data


@pytest.mark.kernel
def test_on_a_full_disk_all_is_taken_over_or_nothing(original: Path, tmp_path: Path) -> None:
    capabilities.require("kernel")
    root, filler = tmp_path / "full" / "root", tmp_path / "full" / "filler"
    root.parent.mkdir()
    abi.mount("tmpfs", root.parent, "tmpfs", 0, "size=8m")
    try:
        shutil.copytree(original, root)
        refused = 0
        for free in range(0, 512 << 10, 8 << 10):
            for path in root.glob("metadata.*"):
                if path.name != "metadata.db":
                    path.unlink()
            status = os.statvfs(root)
            filler.write_bytes(bytes(status.f_bavail * status.f_frsize - free))
            layout = Layout(root)
            try:
                assert take_over(layout, Mode.OVERLAYFS) == 84
            except ObdlabError:
                refused += 1
                assert not layout.metadata.exists()
            finally:
                layout.close()
            filler.unlink()
            snapshotter = open_snapshotter(root.parent)
            assert len(snapshotter.walk()) == 84
            snapshotter.close()
        assert 0 < refused < 64
    finally:
        abi.umount2(root.parent)


def test_a_root_in_use_is_refused(original: Path, tmp_path: Path) -> None:
    with (original / "metadata.db").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as bbolt does
        with pytest.raises(ImportRootError, match="still runs"):
            open_snapshotter(tmp_path)
    make_image(original, writable=False)
    point = original / "snapshots" / str(ids_of(original)["image"]) / "block/mountpoint"
    abi.mount(str(tmp_path), point, "", _MS_BIND, "")
    try:
        with pytest.raises(ImportRootError, match=r"in use.*mountpoint"):
            open_snapshotter(tmp_path)
    finally:
        mount.unmount(point)
    assert not list(original.glob("metadata.sqlite*"))
    # Nothing was lost by the refusals.
    snapshotter = open_snapshotter(tmp_path)
    assert len(snapshotter.walk()) == 84
    snapshotter.close()


def test_a_root_that_was_moved_is_refused(original: Path, tmp_path: Path) -> None:
    make_image(original, writable=False)
    config = original / "snapshots" / str(ids_of(original)["image"]) / "block/config.v1.json"
    config.write_text(config.read_text().replace(str(original), "/var/lib/gone"))
    with pytest.raises(ImportRootError, match="moved"):
        open_snapshotter(tmp_path)


def test_a_root_that_both_have_changed_is_refused(original: Path, tmp_path: Path) -> None:
    open_snapshotter(tmp_path).close()
    (original / "metadata.db.imported").write_text("1\n")
    with pytest.raises(ImportRootError, match="has changed this root"):
        open_snapshotter(tmp_path)


def test_an_import_that_was_cut_off_begins_anew(original: Path, tmp_path: Path) -> None:
    (original / "metadata.sqlite.importing").write_bytes(b"half")
    (original / "metadata.sqlite.importing-wal").write_bytes(b"half")
    snapshotter = open_snapshotter(tmp_path)
    assert len(snapshotter.walk()) == 84
    assert {path.name for path in original.glob("*importing*")} == set()
    snapshotter.close()


def test_damage_is_told_and_nothing_deleted(written: Path, tmp_path: Path) -> None:
    data = (written / "metadata.db").read_bytes()
    source = random.Random(7)
    failed = 0
    for number in range(150):
        broken = bytearray(data)
        if number == 0:
            broken = broken[:5000]
        for _ in range(source.choice((1, 8, 200))):
            at = source.randrange(len(broken))
            broken[at : at + 4] = struct.pack("<I", source.choice((0, 1, 0xFFFFFFFF, source.getrandbits(32))))
        path = tmp_path / "broken.db"
        path.write_bytes(broken)
        try:
            with BoltFile(path) as file:
                read_snapshots(file)
        except FormatError:
            failed += 1
    assert failed > 20
    root = tmp_path / "root"
    (root / "snapshots/1/fs").mkdir(parents=True)
    (root / "metadata.db").write_bytes(data[:5000])
    with pytest.raises(ImportRootError, match=r"metadata\.db"):
        open_snapshotter(tmp_path)
    assert (root / "snapshots/1/fs").is_dir()


def test_buckets(written: Path) -> None:
    def names(bucket: Bucket) -> Iterator[bytes]:
        for name, value in bucket.items():
            yield name
            if isinstance(value, Bucket):
                assert value.sequence >= 0

    with BoltFile(written / "metadata.db") as file:
        top = file.root.bucket(b"v1")
        assert list(names(top)) == [b"parents", b"snapshots"]
        found = list(names(top.bucket(b"snapshots")))
        assert found == sorted(found)
        assert list(file.root.bucket(b"no such").items()) == []
        assert file.root.get(b"no such") is None
        with pytest.raises(FormatError, match="no bucket"):
            top.bucket(b"parents").bucket(next(names(top.bucket(b"parents"))))


KILLED = """
import os, sys
from pathlib import Path
from tests.snapshotter.test_core import open_snapshotter

step, count = sys.argv[1], int(sys.argv[2])
real = getattr(os, step)

def killing(*arguments, **options):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), 9)
    return real(*arguments, **options)

setattr(os, step, killing)
open_snapshotter(Path(sys.argv[3])).close()
"""


@pytest.mark.parametrize(
    "step", ["replace", *(pytest.param(step, marks=pytest.mark.slow) for step in ("fsync", "open"))]
)
def test_a_kill_at_every_step_loses_nothing(original: Path, tmp_path: Path, step: str) -> None:
    make_image(original, writable=False)
    counts = range(1, 20) if step != "open" else range(1, 40, 8)
    kills = 0
    for count in counts:
        for path in original.glob("metadata.*"):
            if path.name != "metadata.db":
                path.unlink()
        command = [sys.executable, "-c", KILLED, step, str(count), str(tmp_path)]
        done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, timeout=60, check=False)
        snapshotter = open_snapshotter(tmp_path)
        assert len(snapshotter.walk()) == 84
        assert (original / "snapshots/1/fs/file").read_text() == "kept"
        snapshotter.close()
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    assert kills


def test_an_original_root_is_not_ignored_where_nothing_takes_it_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "metadata.db").write_bytes(b"")
    monkeypatch.setattr("obdlab.plugins._entries", lambda group: {})
    with pytest.raises(RootError, match=r"no installed package takes over metadata\.db"):
        open_snapshotter(tmp_path)
    assert not (tmp_path / "root" / "metadata.sqlite").exists()
