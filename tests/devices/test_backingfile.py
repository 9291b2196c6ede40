"""The file behind a loop device, over a simulated tree of /sys/block."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from obdlab.devices import backingfile, loop
from obdlab.devices.backingfile import go_on_with, is_behind
from obdlab.devices.fuse_loop import label_below
from obdlab.errors import DeviceError

FILE = 77


@pytest.mark.parametrize(
    ("files", "behind"),
    [
        ({0: "/a/disk"}, True),
        ({0: "/a/disk (deleted)"}, True),
        ({0: "/a/disk.other"}, False),
        ({0: "/dev/loop1", 1: "/a/disk"}, True),
        ({0: "/dev/loop1", 1: "/a/other"}, False),
        ({0: "/dev/loop1"}, False),
        ({0: "/dev/loop1", 1: "/dev/loop0"}, False),
        ({}, False),
    ],
    ids=["it", "it, deleted", "another", "it, one below", "another, one below", "none below", "a circle", "none"],
)
def test_a_file_is_behind_its_device_and_the_one_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[int, str], behind: bool
) -> None:
    monkeypatch.setattr(loop, "_SYS_BLOCK", tmp_path)
    for number, file in files.items():
        directory = tmp_path / f"loop{number}" / "loop"
        directory.mkdir(parents=True)
        (directory / "backing_file").write_text(f"{file}\n")
    assert is_behind("/a/disk", Path("/dev/loop0")) is behind
    assert not is_behind("", Path("/dev/loop0"))


@pytest.mark.parametrize(("devices", "behind"), [(8, True), (9, False)])
def test_a_file_is_looked_for_below_eight_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, behind: bool
) -> None:
    files = [f"/dev/loop{number}" for number in range(1, devices)] + ["/a/disk"]
    monkeypatch.setattr(loop, "backing_of", lambda device: files[int(device.name.removeprefix("loop"))])
    assert is_behind("/a/disk", Path("/dev/loop0")) is behind


class Host:
    """Loop devices as files in a directory; notes how they are opened and which one gets another file."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory / "device"
        self.nodes = [directory / "loop0", directory / "loop1"]
        for node in self.nodes:
            node.touch()
        self.found = self.nodes[:1]
        self.backing = {self.nodes[0]: "/a/disk", self.nodes[1]: "/a/disk"}
        self.labels: dict[Path, str] = {}
        self.used = False
        self.file_system = "ext4"
        self.opened: list[tuple[Path, bool]] = []
        self.changed: list[tuple[Path, int]] = []
        self.refusal: OSError | None = None
        self._open = os.open
        monkeypatch.setattr(backingfile, "_NODES", str(directory / "loop"))
        monkeypatch.setattr(backingfile, "devices_of", lambda _: self.found)
        monkeypatch.setattr(backingfile, "detect_fs", lambda _: (self.file_system, ""))
        monkeypatch.setattr(loop, "backing_of", self.backing.__getitem__)
        monkeypatch.setattr(loop, "label_of", lambda device: self.labels.get(device, ""))
        monkeypatch.setattr(loop, "in_use", lambda _: self.used)
        monkeypatch.setattr(loop, "change_backing", self._change)
        monkeypatch.setattr(os, "open", self._note_open)

    def _note_open(self, path: Path, flags: int, *rest: int, **options: int) -> int:
        if path in self.nodes:
            assert flags & ~os.O_EXCL == os.O_RDONLY | os.O_CLOEXEC
            self.opened.append((path, bool(flags & os.O_EXCL)))
        return self._open(path, flags, *rest, **options)

    def _change(self, device: int, file: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.changed.append((Path(os.readlink(f"/proc/self/fd/{device}")), file))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_an_unused_device_is_claimed_while_its_file_changes(host: Host) -> None:
    before = os.listdir("/proc/self/fd")
    go_on_with(host.directory, FILE)
    assert host.opened == [(host.nodes[0], True)]
    assert host.changed == [(host.nodes[0], FILE)]
    assert os.listdir("/proc/self/fd") == before


def test_the_device_below_gets_the_file_if_the_label_says_that_it_belongs_to_the_same_directory(host: Host) -> None:
    host.used = True
    host.backing[host.nodes[0]] = str(host.nodes[1])
    host.labels[host.nodes[1]] = label_below(host.directory)
    go_on_with(host.directory, FILE)
    assert host.opened == [(host.nodes[1], False)]
    assert host.changed == [(host.nodes[1], FILE)]
    host.labels[host.nodes[1]] = "another"  # somebody's loop device on a loop device
    host.used = False
    go_on_with(host.directory, FILE)
    assert host.opened[1:] == [(host.nodes[0], True)]
    assert host.changed[1:] == [(host.nodes[0], FILE)]


def test_a_label_decides_only_about_loop_devices(host: Host) -> None:
    host.labels[Path("/a/disk")] = label_below(host.directory)
    go_on_with(host.directory, FILE)
    assert host.changed == [(host.nodes[0], FILE)]


def test_a_mounted_erofs_survives_the_change_and_others_are_left_alone(host: Host) -> None:
    host.used = True
    with pytest.raises(DeviceError, match="in use, and a mounted ext4 would not survive the change"):
        go_on_with(host.directory, FILE)
    assert (host.opened, host.changed) == ([], [])
    host.file_system = "erofs"
    go_on_with(host.directory, FILE)
    assert host.opened == [(host.nodes[0], False)]
    assert host.changed == [(host.nodes[0], FILE)]


@pytest.mark.parametrize("count", [0, 2])
def test_a_directory_has_one_device(host: Host, count: int) -> None:
    host.found = host.nodes[:count]
    with pytest.raises(DeviceError, match=rf"device device: no loop device of its own \(got {count}, wanted one\)"):
        go_on_with(host.directory, FILE)
    assert host.opened == []


def test_a_refusal_of_the_kernel_is_an_error_and_closes_the_device(host: Host) -> None:
    host.refusal = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DeviceError, match="loop0: the kernel keeps the file behind it: Invalid argument"):
        go_on_with(host.directory, FILE)
    assert os.listdir("/proc/self/fd") == before
    host.nodes[0].unlink()
    with pytest.raises(DeviceError, match="loop0: cannot open: No such file or directory"):
        go_on_with(host.directory, FILE)
