"""Containers on a writable device of their own: made, written, committed to a layer, started from again."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.errors import SourceError
from obdlab.image.config import ConfigError, ImageConfig, UpperConfig
from obdlab.layers.seal import SwitchMark
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.snapshotter import writable
from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.imagemounts import ImageDevices
from obdlab.snapshotter.layout import Layout
from obdlab.snapshotter.overlaybd import ImageOptions
from obdlab.snapshotter.store import Kind, StoreError, Writer
from obdlab.snapshotter.writable import (
    LABEL_ACTIVE_PATH,
    LABEL_COMMIT_PATH,
    LABEL_VSIZE,
    LABEL_WRITABLE,
    FsSpec,
    Mode,
)
from obdlab.system import abi, mount
from tests import capabilities
from tests.snapshotter import imagefiles
from tests.snapshotter.mounting import mounted

if TYPE_CHECKING:
    from collections.abc import Iterator

DIR = {LABEL_WRITABLE: "dir"}
SMALL = {LABEL_VSIZE: "1"}


class Root:
    """A snapshotter, its devices, and the opening of it anew."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.devices = DeviceService(directory / "run", Settings(cache_dir=directory / "cache"))

    @contextmanager
    def opened(self, **options: object) -> Iterator[Snapshotter]:
        layout = Layout(self.directory / "root")
        snapshotter = Snapshotter(layout, ImageDevices(layout, self.devices), ImageOptions(**options))
        try:
            yield snapshotter
        finally:
            snapshotter.close()

    def home(self, number: int) -> Path:
        return self.directory / "root" / "snapshots" / str(number)

    def lose_mounts(self) -> None:
        """What a reboot does: no mount, no device, an empty run directory."""
        for entry in reversed(mount.mounts()):
            if self.directory in entry.mountpoint.parents:
                mount.unmount(entry.mountpoint, lazy=True)
        self.devices.shutdown(force=True)
        shutil.rmtree(self.directory / "run", ignore_errors=True)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    capabilities.require("kernel")
    root = Root(tmp_path)
    yield root
    root.lose_mounts()


def golden(snapshotter: Snapshotter, root: Root) -> str:
    """Have an image of one local layer; return its name."""
    layers, _annotations = imagefiles.golden_layers()
    snapshotter.prepare("extract", "", {"containerd.io/snapshot.ref": "golden"})
    with tarfile.open(fileobj=io.BytesIO(layers[0])) as archive:
        archive.extractall(root.home(1) / "fs", filter="data")
    snapshotter.commit("golden", "extract", {})
    return "golden"


@pytest.mark.kernel
@pytest.mark.parametrize("sparse", [False, True])
def test_an_image_is_written_committed_and_written_again(root: Root, tmp_path: Path, sparse: bool) -> None:
    with root.opened(sparse=sparse) as snapshotter:
        image = golden(snapshotter, root)
        (made,) = snapshotter.prepare("one", image, DIR)
        assert (made.type, made.source, made.options) == (
            "bind",
            str(root.home(2) / "block/mountpoint"),
            ("rw", "rbind"),
        )
        with mounted([made], tmp_path / "rootfs") as rootfs:
            before = sorted(os.listdir(rootfs))
            (rootfs / "new").write_bytes(b"first" * 10000)
            with pytest.raises(FailedPreconditionError, match="in use"):
                snapshotter.commit("layer", "one", {})
            with pytest.raises(FailedPreconditionError, match="in use"):
                snapshotter.remove("one")
        snapshotter.commit("layer", "one", DIR | {"note": "kept"})
        committed = snapshotter.stat("layer")
        sealed = str(root.home(2) / "fs/overlaybd.sealed")
        assert committed.kind is Kind.COMMITTED
        assert committed.labels == {"note": "kept", LABEL_COMMIT_PATH: sealed}
        config = ImageConfig.load(root.home(2) / "block/config.v1.json")
        assert not config.upper.active
        assert [lower.dir for lower in config.lowers] == [f"{root.home(1)}/fs", f"{root.home(2)}/fs"]
        assert sorted(os.listdir(root.home(2) / "block")) == [
            "backstore_mark",
            "config.v1.json",
            "init-debug.log",
            "mountpoint",
        ]
        assert root.devices.list() == []
        (second,) = snapshotter.prepare("two", "layer", DIR)
        (shared,) = snapshotter.prepare("three", "layer", {})
        with mounted([second], tmp_path / "rootfs") as rootfs:
            (rootfs / "new").unlink()
        with mounted([shared], tmp_path / "rootfs") as rootfs:
            assert (rootfs / "new").read_bytes() == b"first" * 10000
            assert sorted(os.listdir(rootfs)) == sorted([*before, "new"])
        (again,) = snapshotter.mounts("two")
        with mounted([again], tmp_path / "rootfs") as rootfs:
            assert sorted(os.listdir(rootfs)) == before
        for key in ("two", "three", "layer", image):
            snapshotter.remove(key)
        assert root.devices.list() == []
        assert list((tmp_path / "root/snapshots").iterdir()) == []


@pytest.mark.kernel
def test_what_was_written_outlives_a_reboot(root: Root, tmp_path: Path) -> None:
    with root.opened(mode=Mode.DIR) as snapshotter:
        (made,) = snapshotter.prepare("one", "", SMALL)
        with mounted([made], tmp_path / "rootfs") as rootfs:
            assert os.statvfs(rootfs).f_blocks * os.statvfs(rootfs).f_frsize > 900 << 20
            (rootfs / "file").write_text("written")
            os.sync()
    root.lose_mounts()
    with root.opened() as snapshotter:  # the mode is the container's, whatever the configuration says now
        with mounted(snapshotter.mounts("one"), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "file").read_text() == "written"
        snapshotter.remove("one")


@pytest.mark.kernel
def test_a_device_is_handed_over(root: Root, tmp_path: Path) -> None:
    with root.opened() as snapshotter:
        image = golden(snapshotter, root)
        (made,) = snapshotter.prepare("one", image, {LABEL_WRITABLE: "dev"})
        assert (made.type, made.options) == ("ext4", ("rw", "discard", "errors=remount-ro"))
        assert (root.home(2) / "block/backstore_mark").read_text() == made.source
        target = tmp_path / "elsewhere"
        target.mkdir()
        abi.mount(made.source, target, "ext4", 0, "discard")
        try:
            (target / "new").write_text("x")
            with pytest.raises(FailedPreconditionError, match="in use"):
                snapshotter.commit("layer", "one", {})
        finally:
            abi.umount2(target)
        assert snapshotter.mounts("one") == [made]
        snapshotter.commit("layer", "one", {})
        with mounted(snapshotter.view("look", "layer", {}), target):
            assert (target / "new").read_text() == "x"


@pytest.mark.kernel
def test_other_file_systems_and_options(root: Root, tmp_path: Path) -> None:
    with root.opened(default_fs="ext4;noatime;-O ^has_journal -L obdlab") as snapshotter:
        (made,) = snapshotter.prepare("one", "", DIR | SMALL)
        entry = mount.mount_at(Path(made.source))
        assert entry is not None
        label = subprocess.run(["blkid", "-p", "-o", "value", "-s", "LABEL", entry.source], capture_output=True)
        assert label.stdout.strip() == b"obdlab"
        if shutil.which("mkfs.xfs"):
            (made,) = snapshotter.prepare(
                "two", "", DIR | SMALL | {"containerd.io/snapshot/overlaybd/blob-fs-type": "xfs"}
            )
            entry = mount.mount_at(Path(made.source))
            assert entry is not None
            assert entry.fs_type == "xfs"
            (Path(made.source) / "file").write_text("x")
        with pytest.raises(Exception, match="mkfs -t ntfs"):
            snapshotter.prepare("bad", "", DIR | SMALL | {"containerd.io/snapshot/overlaybd/blob-fs-type": "ntfs;;"})
        with pytest.raises(InvalidArgumentError, match="erofs"):
            snapshotter.prepare("bad", "", DIR | {"containerd.io/snapshot/overlaybd/blob-fs-type": "erofs"})
        assert {snapshot.key for snapshot in snapshotter.walk()} <= {"one", "two"}


@pytest.mark.kernel
def test_the_layer_may_lie_elsewhere(root: Root, tmp_path: Path) -> None:
    place = Path("/dev/shm") / f"obdlab-{os.getpid()}"
    labels = DIR | SMALL | {LABEL_ACTIVE_PATH: str(place)}
    place.mkdir(mode=0o755)
    try:
        with root.opened(active_roots=(place,)) as snapshotter:
            (made,) = snapshotter.prepare("one", "", labels)
            assert sorted(os.listdir(place)) == ["writable_data", "writable_index"]
            with mounted([made], tmp_path / "rootfs") as rootfs:
                (rootfs / "file").write_text("x")
            snapshotter.commit("layer", "one", {})
            assert os.listdir(place) == []
            with mounted(snapshotter.view("look", "layer", {}), tmp_path / "rootfs") as rootfs:
                assert (rootfs / "file").read_text() == "x"
            snapshotter.prepare("two", "layer", labels)
            snapshotter.remove("two")
            assert os.listdir(place) == []
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.kernel
def test_a_commit_to_a_full_file_system_says_so(tmp_path: Path) -> None:
    """A layer that lies elsewhere is copied into the root. Its own error is reported, not one of cleaning up."""
    upper = UpperConfig(str(tmp_path / "index"), str(tmp_path / "data"), 1)
    writable.make_upper(Path(upper.data), Path(upper.index), 1, sparse=False, make_ext4=True)
    full = tmp_path / "full"
    full.mkdir()
    abi.mount("tmpfs", full, "tmpfs", 0, "nr_inodes=1")  # its root takes the one inode
    try:
        with pytest.raises(OSError, match="No space left"):
            writable.seal(upper, full / "overlaybd.sealed")
        assert os.listdir(full) == []
    finally:
        abi.umount2(full)
    writable.seal(upper, tmp_path / "overlaybd.sealed")
    assert (tmp_path / "overlaybd.sealed").stat().st_size > 0


@pytest.mark.kernel
def test_an_image_with_an_open_file_is_in_use(root: Root) -> None:
    """No mount but its own shows the use: the kernel refuses to unmount it."""
    with root.opened() as snapshotter:
        image = golden(snapshotter, root)
        snapshotter.prepare("one", image, {})
        snapshotter.remove("one")
        with (root.home(1) / "block/mountpoint/big").open("rb"):
            with pytest.raises(FailedPreconditionError, match="image snapshot is in use"):
                snapshotter.remove(image)
            assert [snapshot.key for snapshot in snapshotter.walk()] == [image]
        snapshotter.remove(image)
        assert root.devices.list() == []


@pytest.mark.kernel
def test_an_image_that_was_unmounted_by_hand_is_mounted_again(root: Root, tmp_path: Path) -> None:
    with root.opened() as snapshotter:
        snapshotter.prepare("one", golden(snapshotter, root), {})
        point = root.home(1) / "block/mountpoint"
        source = mount.mounts_at(point)[-1].source
        abi.umount2(point)
        with mounted(snapshotter.mounts("one"), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "abs").exists()
        assert [entry.source for entry in mount.mounts_at(point)] == [source]
        assert len(root.devices.list()) == 1


def test_who_gets_no_device(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "root")
    devices = DeviceService(tmp_path / "run", Settings(cache_dir=tmp_path / "cache"))
    snapshotter = Snapshotter(layout, ImageDevices(layout, devices), ImageOptions(mode=Mode.DIR))
    try:
        # A plain layer that is pulled, and a container over it.
        (made,) = snapshotter.prepare("extract", "", {"containerd.io/snapshot.ref": "plain"})
        assert made.source.endswith("/1/fs")
        snapshotter.commit("plain", "extract", {})
        (made,) = snapshotter.prepare("container", "plain", DIR)
        assert made.type == "overlay"
        assert LABEL_WRITABLE not in snapshotter.stat("container").labels
        (made,) = snapshotter.prepare("image", "", {"containerd.io/snapshot/type": "image"})
        assert made.source.endswith("/3/fs")
        with pytest.raises(InvalidArgumentError, match="absolute"):
            snapshotter.prepare("bad", "", {LABEL_ACTIVE_PATH: "relative"})
        with pytest.raises(InvalidArgumentError, match="vsize"):
            snapshotter.prepare("bad", "", {LABEL_VSIZE: "99999999"})
        assert not devices.list()
    finally:
        snapshotter.close()


@pytest.mark.parametrize("sparse", [True, False])
def test_a_layer_whose_file_system_fails_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool
) -> None:
    def full(data: Path, index: Path) -> None:
        assert data.exists()
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(writable, "_make_ext4", full)
    with pytest.raises(OSError, match="no space"):
        writable.make_upper(tmp_path / "a/data", tmp_path / "a/index", 1, sparse=sparse, make_ext4=True)
    assert not list((tmp_path / "a").iterdir())


_DYING_COMMIT = """
import os, sys
from pathlib import Path
from obdlab.image import config
from obdlab.snapshotter import core, writable, store
from tests.snapshotter.test_writable import Root

step = sys.argv[2]
def dies(function, before):
    def wrapped(*arguments, **named):
        if before:
            os._exit(9)
        function(*arguments, **named)
        os._exit(9)
    return wrapped

with Root(Path(sys.argv[1])).opened() as snapshotter:
    if step == "sealed":
        writable.seal = dies(writable.seal, False)
    elif step == "configured":
        store.Writer.commit = dies(store.Writer.commit, True)
    elif step == "unfinished":
        store.Writer.commit = dies(store.Writer.commit, False)
    elif step == "committed":
        writable.drop = dies(writable.drop, True)
    elif step == "dropped":
        writable.drop = dies(writable.drop, False)
    snapshotter.commit("layer", "one", {})
"""


def kill_a_commit(root: Root, tmp_path: Path, step: str) -> None:
    """Write a file into the snapshot "one", and have a process die in its commit as "layer"."""
    with root.opened() as snapshotter:
        (made,) = snapshotter.prepare("one", "", DIR | SMALL)
        with mounted([made], tmp_path / "rootfs") as rootfs:
            (rootfs / "file").write_text("written")
    command = [sys.executable, "-c", textwrap.dedent(_DYING_COMMIT), str(tmp_path), step]
    assert subprocess.run(command, timeout=120, check=False).returncode == 9


@pytest.mark.kernel
@pytest.mark.parametrize("step", ["sealed", "configured", "unfinished", "committed", "dropped"])
def test_a_killed_commit_is_undone_or_finished(root: Root, tmp_path: Path, step: str) -> None:
    kill_a_commit(root, tmp_path, step)
    with root.opened() as snapshotter:
        done = step in ("committed", "dropped")
        assert [snapshot.key for snapshot in snapshotter.walk()] == ["layer" if done else "one"]
        if not done:
            with mounted(snapshotter.mounts("one"), tmp_path / "rootfs") as rootfs:
                (rootfs / "more").write_text("x")
            snapshotter.commit("layer", "one", {})
        assert not (root.home(1) / "block/writable.json").exists()
        assert not (root.home(1) / "block/writable_data").exists()
        with mounted(snapshotter.view("look", "layer", {}), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "file").read_text() == "written"


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("step", "failing", "error"),
    [
        ("configured", (ImageConfig, "save"), ConfigError("disk full")),
        ("committed", (writable, "drop"), OSError("disk full")),
        ("dropped", (SwitchMark, "remove"), SourceError("disk full")),
    ],
)
def test_a_commit_that_cannot_be_recovered_keeps_no_other_snapshot(
    root: Root,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: str,
    failing: tuple[object, str],
    error: Exception,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    kill_a_commit(root, tmp_path, step)
    key = "one" if step == "configured" else "layer"
    with monkeypatch.context() as patched:
        patched.setattr(*failing, fail)
        with root.opened() as snapshotter:
            assert f"snapshot '{key}': not recovered: disk full" in caplog.text
            snapshotter.prepare("plain", "", {})
    with root.opened() as snapshotter:
        if step == "configured":
            snapshotter.commit("layer", "one", {})
        assert not (root.home(1) / "block/writable.json").exists()
        with mounted(snapshotter.view("look", "layer", {}), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "file").read_text() == "written"


@pytest.mark.kernel
@pytest.mark.parametrize("mounts_first", [True, False])
def test_a_commit_that_could_not_be_undone_is_made_again(
    root: Root,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mounts_first: bool,
) -> None:
    saved: list[ImageConfig] = []
    save = ImageConfig.save

    def full(writer: Writer, *arguments: object) -> None:
        raise StoreError("disk full")

    def save_once(config: ImageConfig, path: Path) -> None:
        saved.append(config)
        if len(saved) > 1:
            raise ConfigError("disk full")
        save(config, path)

    with root.opened() as snapshotter:
        (made,) = snapshotter.prepare("one", golden(snapshotter, root), DIR)
        with mounted([made], tmp_path / "rootfs") as rootfs:
            (rootfs / "file").write_text("written")
        with monkeypatch.context() as patched:
            patched.setattr(Writer, "commit", full)
            patched.setattr(ImageConfig, "save", save_once)
            with pytest.raises(StoreError, match="disk full"):
                snapshotter.commit("layer", "one", {})
        assert len(saved) == 2
        assert "a failed change was not undone whole: disk full" in caplog.text
        assert not (root.home(2) / "fs/overlaybd.sealed").exists()
        if mounts_first:
            with mounted(snapshotter.mounts("one"), tmp_path / "rootfs") as rootfs:
                assert (rootfs / "file").read_text() == "written"
        snapshotter.commit("layer", "one", {})
        config = ImageConfig.load(root.home(2) / "block/config.v1.json")
        assert [lower.dir for lower in config.lowers] == [f"{root.home(1)}/fs", f"{root.home(2)}/fs"]
        with mounted(snapshotter.view("look", "layer", {}), tmp_path / "rootfs") as rootfs:
            assert (rootfs / "file").read_text() == "written"


@pytest.mark.parametrize(
    ("text", "spec", "options", "mkfs"),
    [
        ("ext4", FsSpec("ext4"), "discard", []),
        ("ext4;;", FsSpec("ext4", "", ()), "", []),
        ("xfs", FsSpec("xfs"), "nouuid,discard", ["-f"]),
        ("xfs;noatime,nouuid;-f -L x", FsSpec("xfs", "noatime,nouuid", ("-f", "-L", "x")), "noatime,nouuid", None),
        ("btrfs", FsSpec("btrfs"), "", []),
    ],
)
def test_file_system_specs(text: str, spec: FsSpec, options: str, mkfs: list[str] | None) -> None:
    assert FsSpec.parse(text) == spec
    assert spec.writable_options() == options
    wanted = list(spec.mkfs_options or ()) if mkfs is None else mkfs
    assert spec.mkfs_command(Path("/dev/x")) == ["mkfs", "-t", spec.fs_type, *wanted, "/dev/x"]


def test_only_an_ext4_of_the_usual_options_is_made_without_a_program() -> None:
    made_here = {text: FsSpec.parse(text).made_here for text in ("ext4", "ext4;noatime", "ext4;;-b 1024", "xfs")}
    assert made_here == {"ext4": True, "ext4;noatime": True, "ext4;;-b 1024": False, "xfs": False}


@pytest.mark.parametrize(("label", "size_gb"), [(None, 64), ("", 64), ("7", 7), ("ten", 64), ("-1", 64), ("0", 64)])
def test_sizes_of_new_disks(label: str | None, size_gb: int) -> None:
    """As in the original, 64 GB for want of a number."""
    assert writable.size_gb({} if label is None else {LABEL_VSIZE: label}) == size_gb


def test_a_bad_spec_is_refused() -> None:
    for text in ("", ";x", "-t", "../x", "ext4 -F"):
        with pytest.raises(InvalidArgumentError, match="file system type"):
            FsSpec.parse(text)


def test_a_damaged_note_is_told(tmp_path: Path) -> None:
    note = tmp_path / "writable.json"
    assert writable.WritableDevice.load(note) is None
    for text in ("", "{}", '{"mode": "x", "data": "", "index": "", "vsize": 0}', "[]"):
        note.write_text(text)
        with pytest.raises(FailedPreconditionError, match="damaged"):
            writable.WritableDevice.load(note)
