"""Mounting, unmounting, mountinfo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.devices import loop
from obdlab.errors import DeviceError
from obdlab.system import abi, mount
from tests import capabilities

MIB = 1 << 20
LINE = r"36 35 98:0 /mnt1 /mnt\040two/a\134b rw,noatime master:1 shared:2 - ext3 /dev/ro\011ot rw,errors=continue"


def test_mountinfo_line() -> None:
    (entry,) = mount.parse_mountinfo(LINE + "\n")
    assert entry == mount.MountEntry(
        36, 35, "98:0", Path("/mnt two/a\\b"), "ext3", "/dev/ro\tot", "rw,errors=continue"
    )
    without_tags = LINE.replace(" master:1 shared:2", "")
    assert mount.parse_mountinfo(without_tags) == [entry]


@pytest.mark.parametrize("line", ["", "36 35 98:0 / /mnt rw", "36 35 - ext3 a b", "x y 98:0 / / rw - ext3 a b"])
def test_mountinfo_that_is_none(line: str) -> None:
    with pytest.raises(DeviceError, match="mountinfo"):
        mount.parse_mountinfo(line + "\n")


@given(st.text(alphabet=LINE + "\n", max_size=200))
def test_mountinfo_never_fails_otherwise(text: str) -> None:
    try:
        mount.parse_mountinfo(text)
    except DeviceError:
        pass


@pytest.mark.kernel
def test_own_mounts_can_be_read() -> None:
    assert any(entry.mountpoint == Path("/proc") and entry.fs_type == "proc" for entry in mount.mounts())
    assert mount.is_mounted(Path("/proc"))
    assert not mount.is_mounted(Path("/proc/self"))


def image(path: Path, *command: str) -> Path:
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(24 * MIB)
    subprocess.run([*command, str(path)], check=True, capture_output=True)
    return path


LABEL = "obdlab-test-mount"


def attach(file: Path, *, read_only: bool) -> Path:
    with file.open("r+b") as stream:
        return loop.attach(stream.fileno(), label=LABEL, read_only=read_only)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    device = attach(image(tmp_path / "ext4", "mkfs.ext4", "-q"), read_only=False)
    yield device
    loop.detach(device, label=LABEL)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mount point"
    path.mkdir()
    yield path
    while mount.unmount(path, lazy=True):
        pass


@pytest.mark.kernel
def test_mount_and_unmount(ext4: Path, target: Path) -> None:
    assert mount.mount(ext4, target, read_only=True, options="errors=continue") == "ext4"
    assert mount.is_mounted(target)
    assert [entry.mountpoint for entry in mount.mounts_of(ext4)] == [target]
    entry = mount.mount_at(target)
    assert entry is not None
    assert (entry.source, entry.fs_type) == (str(ext4), "ext4")
    assert loop.in_use(ext4)
    assert mount.unmount(target)
    assert not mount.unmount(target)
    assert not mount.is_mounted(target)
    assert not loop.in_use(ext4)


@pytest.mark.kernel
def test_unreplayed_journal_is_mounted_read_only_with_noload(tmp_path: Path, target: Path) -> None:
    path = image(tmp_path / "dirty", "mkfs.ext4", "-q")
    device = attach(path, read_only=False)
    try:
        mount.mount(device, target, read_only=False)
        (target / "file").write_bytes(b"x")
        subprocess.run(["sync", "-f", str(target)], check=True)
        copy = tmp_path / "copy"  # what a crash now would leave
        copy.write_bytes(device.read_bytes())
        mount.unmount(target)
    finally:
        loop.detach(device, label=LABEL)
    device = attach(copy, read_only=True)
    try:
        assert mount.detect_fs(device) == ("ext4", True)
        assert mount.mount(device, target, read_only=True) == "ext4"
        entry = mount.mount_at(target)
        assert entry is not None
        assert "norecovery" in entry.super_options or "noload" in entry.super_options
        mount.unmount(target)
    finally:
        loop.detach(device, label=LABEL)


@pytest.mark.kernel
def test_erofs_is_known(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    (source / "file").write_bytes(b"content")
    path = tmp_path / "erofs"
    subprocess.run(["mkfs.erofs", "-b4096", str(path), str(source)], check=True, capture_output=True)
    device = attach(path, read_only=True)
    try:
        assert mount.mount(device, target, read_only=True) == "erofs"
        assert (target / "file").read_bytes() == b"content"
        mount.unmount(target)
    finally:
        loop.detach(device, label=LABEL)


@pytest.mark.kernel
def test_no_file_system_there(tmp_path: Path, target: Path) -> None:
    path = tmp_path / "zeros"
    path.write_bytes(bytes(MIB))
    device = attach(path, read_only=True)
    try:
        with pytest.raises(DeviceError, match=f"{device}: no ext4, erofs or xfs"):
            mount.mount(device, target, read_only=True)
    finally:
        loop.detach(device, label=LABEL)


@pytest.mark.kernel
def test_busy_names_the_holder(ext4: Path, target: Path) -> None:
    mount.mount(ext4, target, read_only=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        cwd=target,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(DeviceError, match=rf"busy, held by .*process {holder.pid} \("):
            mount.unmount(target)
    finally:
        holder.communicate(timeout=60)
    assert mount.unmount(target)


@pytest.mark.kernel
def test_an_overlay_is_a_holder(ext4: Path, target: Path, tmp_path: Path) -> None:
    mount.mount(ext4, target, read_only=True)
    lower, merged = tmp_path / "lower", tmp_path / "merged"
    lower.mkdir()
    merged.mkdir()
    abi.mount("overlay", merged, "overlay", abi.MS_RDONLY, f"lowerdir={target}/lost+found:{lower}")
    try:
        assert mount.holders(target) == [f"mount {merged} (overlay)"]
    finally:
        mount.unmount(merged)
    assert mount.holders(target) == []


@pytest.mark.kernel
@pytest.mark.parametrize("read_only", [True, False])
def test_no_image_can_ask_for_a_panic(tmp_path: Path, target: Path, read_only: bool) -> None:
    device = attach(image(tmp_path / "ext4", "mkfs.ext4", "-q", "-e", "panic"), read_only=read_only)
    try:
        mount.mount(device, target, read_only=read_only, options="errors=panic")
        entry = mount.mount_at(target)
        assert entry is not None
        assert "errors=remount-ro" in entry.super_options.split(",")
        assert "panic" not in entry.super_options
        mount.unmount(target)
    finally:
        loop.detach(device, label=LABEL)


@pytest.mark.kernel
@pytest.mark.parametrize("read_only_device", [True, False])
def test_logs_are_skipped_only_where_nothing_can_be_written(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, read_only_device: bool
) -> None:
    """Skipped on a device that can, a log would later be replayed over newer blocks."""
    file = image(tmp_path / "dirty", "mkfs.ext4", "-q", "-O", "^metadata_csum,uninit_bg")
    with file.open("r+b") as stream:  # needs_recovery
        stream.seek(1024 + 0x60)
        features = stream.read(1)[0]
        stream.seek(1024 + 0x60)
        stream.write(bytes([features | 4]))
    device = attach(file, read_only=read_only_device)
    asked: list[str] = []
    real = abi.mount

    def mounting(source: str, place: Path, fs_type: str, flags: int, options: str) -> None:
        asked.append(options)
        real(source, place, fs_type, flags, options)

    monkeypatch.setattr(mount.abi, "mount", mounting)
    try:
        mount.mount(device, target, read_only=True, options="noload,norecovery")
        assert ("noload" in asked[0].split(",")) == read_only_device
        assert "norecovery" not in asked[0]
        mount.unmount(target)
    finally:
        loop.detach(device, label=LABEL)


@pytest.mark.kernel
def test_an_image_beside_the_hosts_files_has_no_devices_and_owners(ext4: Path, target: Path) -> None:
    def flags() -> set[str]:
        line = next(
            line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "mount\\040point" in line
        )
        return set(line.split(" ")[5].split(","))

    mount.mount(ext4, target, read_only=True)
    assert flags() >= {"ro", "nosuid", "nodev"}
    mount.unmount(target)
    mount.mount(ext4, target, read_only=False)  # a container's own root file system
    assert not flags() & {"ro", "nosuid", "nodev"}


@pytest.mark.kernel
def test_erofs_is_not_mounted_for_writing(tmp_path: Path, target: Path) -> None:
    capabilities.require_tools("mkfs.erofs")
    (tmp_path / "tree").mkdir()
    subprocess.run(["mkfs.erofs", "--quiet", tmp_path / "erofs", tmp_path / "tree"], check=True, timeout=60)
    device = attach(tmp_path / "erofs", read_only=False)
    try:
        with pytest.raises(DeviceError, match="cannot be written to"):
            mount.mount(device, target, read_only=False)
    finally:
        loop.detach(device, label=LABEL)
