"""Disk quota of containers, on file systems that have it (in the virtual machine) and on those that do not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.layout import Layout
from obdlab.snapshotter.overlaybd import ImageOptions
from obdlab.snapshotter.quota import LABEL_QUOTA, QuotaError, Quotas, parse_size
from obdlab.snapshotter.writable import LABEL_WRITABLE
from tests.snapshotter.mounting import mounted
from tests.snapshotter.test_core import StuckImages, open_snapshotter
from tests.snapshotter.test_writable import SMALL, Root, golden, root

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["root"]

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("20g", 20 << 30), ("1.5M", 3 << 19), ("4096", 4096), ("10 KiB", 10240), ("1TB", 1 << 40), (" 7m ", 7 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "g", "-1g", "20x", "1023", "0", "1e9", "٣g", "9" * 20 + "p"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not a quota"):
        parse_size(text)


@pytest.mark.kernel
def test_without_project_quota_it_is_refused(tmp_path: Path) -> None:
    snapshotter = open_snapshotter(tmp_path)
    with pytest.raises(FailedPreconditionError, match=r"disk quota: .*prjquota"):
        snapshotter.prepare("key", "", {LABEL_QUOTA: "20m"})
    with pytest.raises(InvalidArgumentError, match="disk_quota: not a quota"):
        snapshotter.prepare("key", "", {LABEL_QUOTA: "much"})
    assert snapshotter.walk() == []
    assert list((tmp_path / "root/snapshots").iterdir()) == []
    # Layers that are being unpacked are not limited.
    snapshotter.prepare("extract-1 x", "", {LABEL_QUOTA: "20m"})
    snapshotter.prepare("key", "", {LABEL_QUOTA: "20m", "containerd.io/snapshot.ref": "chain"})
    snapshotter.close()
    layout = Layout(tmp_path / "root")
    with pytest.raises(QuotaError, match="prjquota"):
        Snapshotter(layout, StuckImages(), ImageOptions(quota_bytes=MIB))
    layout.close()


@pytest.mark.kernel
def test_a_device_of_its_own_is_limited_by_its_size(root: Root, tmp_path: Path) -> None:
    labels = {LABEL_WRITABLE: "dir"}
    with root.opened() as snapshotter:
        image = golden(snapshotter, root)
        snapshotter.prepare("new", "", labels | {LABEL_QUOTA: "2g"})
        with mounted(snapshotter.mounts("new"), tmp_path / "rootfs") as rootfs:
            status = os.statvfs(rootfs)
            assert 1 << 30 < status.f_blocks * status.f_frsize <= 2 << 30
        with pytest.raises(InvalidArgumentError, match="too small"):
            snapshotter.prepare("small", "", labels | SMALL | {LABEL_QUOTA: "20m"})
        with pytest.raises(FailedPreconditionError, match="the size of its image"):
            snapshotter.prepare("on", image, labels | {LABEL_QUOTA: "20g"})


@pytest.fixture(params=["ext4", "xfs"])
def limited(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system with project quota."""
    disk, target = tmp_path / "disk", tmp_path / "mnt"
    target.mkdir()
    make = {
        "ext4": ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", str(disk), "128M"],
        "xfs": ["mkfs.xfs", "-q", "-d", f"file,name={disk},size=400m"],
    }[request.param]
    subprocess.run(["modprobe", "-q", "quota_v2"], check=False)  # ext4 asks for it in a way that finds no module here
    subprocess.run(make, check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop,prjquota", disk, target], check=True, timeout=60)
    yield target
    subprocess.run(["umount", target], check=True, timeout=60)


def snapshotter_on(directory: Path, **options: object) -> Snapshotter:
    return Snapshotter(Layout(directory / "root"), StuckImages(), ImageOptions(**options))  # type: ignore[arg-type]


@pytest.mark.vm
def test_each_container_has_its_own_limit(limited: Path, tmp_path: Path) -> None:
    snapshotter = snapshotter_on(limited, quota_bytes=8 * MIB)
    snapshotter.prepare("extract-1 base", "", {})
    snapshotter.commit("base", "extract-1 base", {})
    projects = set()
    # A label lowers the configured limit, and cannot raise it.
    for number, (labels, limit) in enumerate((({}, 8), ({LABEL_QUOTA: "4m"}, 4), ({LABEL_QUOTA: "1t"}, 8))):
        with mounted(snapshotter.prepare(f"c{number}", "base", labels), tmp_path / "rootfs") as rootfs:
            (rootfs / "fits").write_bytes(bytes((limit - 2) * MIB))
            with pytest.raises(OSError, match=r"quota|space"):
                (rootfs / "more").write_bytes(bytes(8 * MIB))
        projects.add(Quotas.project_of(limited / f"root/snapshots/{number + 2}/fs"))
    assert len(projects) == 3
    assert 0 not in projects
    quotas = Quotas(limited / "root/snapshots")
    for number in range(3):
        snapshotter.remove(f"c{number}")
    assert all(not any(quotas._limits(project)[:2]) for project in projects)
    snapshotter.close()
    snapshotter = snapshotter_on(limited)
    with pytest.raises(FailedPreconditionError, match="larger than the file system"):
        snapshotter.prepare("large", "base", {LABEL_QUOTA: "1t"})
    assert {snapshot.key for snapshot in snapshotter.walk()} == {"base"}
    snapshotter.close()


@pytest.mark.vm
@pytest.mark.parametrize("limited", ["ext4"], indirect=True)
def test_two_roots_on_a_file_system_do_not_meet(limited: Path) -> None:
    one = snapshotter_on(limited / "one", quota_bytes=8 * MIB)
    other = snapshotter_on(limited / "other", quota_bytes=8 * MIB)
    for snapshotter in (one, other):
        snapshotter.prepare("key", "", {})
    found = [Quotas.project_of(limited / name / "root/snapshots/1/fs") for name in ("one", "other")]
    assert len(set(found)) == 2
    one.close()
    other.close()


@pytest.mark.vm
def test_a_quota_that_is_counted_and_not_enforced_is_refused(tmp_path: Path) -> None:
    disk, target = tmp_path / "disk", tmp_path / "mnt"
    target.mkdir()
    subprocess.run(["modprobe", "-q", "quota_v2"], check=False)
    command = ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", str(disk), "32M"]
    subprocess.run(command, check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", disk, target], check=True, timeout=60)
    try:
        layout = Layout(target / "root")
        with pytest.raises(QuotaError, match="prjquota"):
            Snapshotter(layout, StuckImages(), ImageOptions(quota_bytes=MIB))
        layout.close()
    finally:
        subprocess.run(["umount", target], check=True, timeout=60)
