"""How a snapshot is mounted: as containerd's overlayfs snapshotter would, or as a device of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from obdlab.snapshotter.mounts import Mount, device_mounts, snapshot_mounts
from obdlab.snapshotter.store import Kind
from obdlab.snapshotter.writable import Mode

FS, WORK, DEVICE, POINT = Path("/s/3/fs"), Path("/s/3/work"), Path("/dev/loop9"), Path("/s/3/block/mountpoint")
LOWERS = [Path("/s/2/fs"), Path("/s/1/block/mountpoint")]


def test_one_directory_needs_no_overlay() -> None:
    assert snapshot_mounts(Kind.ACTIVE, FS, WORK, [], ("index=off",)) == [Mount("bind", str(FS), ("rw", "rbind"))]
    assert snapshot_mounts(Kind.VIEW, FS, WORK, [], ()) == [Mount("bind", str(FS), ("ro", "rbind"))]
    assert snapshot_mounts(Kind.VIEW, FS, WORK, LOWERS[:1], ()) == [Mount("bind", "/s/2/fs", ("ro", "rbind"))]


@pytest.mark.parametrize("lowers", [LOWERS[:1], LOWERS])
def test_what_is_written_goes_to_the_snapshots_own_directory(lowers: list[Path]) -> None:
    (mount,) = snapshot_mounts(Kind.ACTIVE, FS, WORK, lowers, ("index=off", "userxattr"))
    assert (mount.type, mount.source) == ("overlay", "overlay")
    joined = ":".join(map(str, lowers))
    assert mount.options == ("index=off", "userxattr", f"workdir={WORK}", f"upperdir={FS}", f"lowerdir={joined}")


def test_a_view_of_several_has_nowhere_to_write() -> None:
    (mount,) = snapshot_mounts(Kind.VIEW, FS, WORK, LOWERS, ())
    assert mount == Mount("overlay", "overlay", ("lowerdir=/s/2/fs:/s/1/block/mountpoint",))


def test_a_device_is_handed_over_or_its_mount_point() -> None:
    ext4 = device_mounts(Mode.DEV, POINT, DEVICE, "ext4")
    assert ext4 == [Mount("ext4", "/dev/loop9", ("rw", "discard", "errors=remount-ro"))]
    assert device_mounts(Mode.DEV, POINT, DEVICE, "xfs") == [Mount("xfs", "/dev/loop9", ("rw", "discard"))]
    assert device_mounts(Mode.DIR, POINT, DEVICE, "ext4") == [Mount("bind", str(POINT), ("rw", "rbind"))]
