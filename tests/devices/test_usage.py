"""Mounts that hold a device, in this mount namespace and in others."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from obdlab.devices import loop, usage
from obdlab.devices.usage import namespaces_that_mount, wait_unused
from obdlab.errors import DeviceError


def test_a_mount_is_reported_at_once_and_other_use_if_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    mounts = [SimpleNamespace(mountpoint="/mnt")]
    monkeypatch.setattr(loop, "in_use", lambda _: True)
    monkeypatch.setattr(usage, "mounts_of", lambda _: mounts)
    monkeypatch.setattr(usage, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    with pytest.raises(DeviceError, match=r"still in use \(mounted on /mnt\)"):
        wait_unused(Path("/dev/null"))
    assert slept == []
    mounts.clear()
    with pytest.raises(DeviceError, match="still in use"):
        wait_unused(Path("/dev/null"))
    assert sum(slept) == pytest.approx(usage.TRANSIENT_USE_S, abs=0.1)


def test_use_that_ends_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(loop, "in_use", lambda _: len(slept) < 3)
    monkeypatch.setattr(usage, "mounts_of", lambda _: [])
    monkeypatch.setattr(usage, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    wait_unused(Path("/dev/null"))
    assert len(slept) == 3
    assert max(slept) < 0.1


def test_all_users_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [SimpleNamespace(mountpoint="/a"), SimpleNamespace(mountpoint="/b")]
    elsewhere: list[str] = []
    searched: list[bytes] = []

    def namespaces(wanted: bytes) -> list[str]:
        searched.append(wanted)
        return elsewhere

    monkeypatch.setattr(usage, "mounts_of", lambda _: mounts)
    monkeypatch.setattr(usage, "namespaces_that_mount", namespaces)
    assert usage._users(Path("/dev/null")) == "mounted on /a, mounted on /b"
    assert searched == []  # every process would have to be asked
    mounts.clear()
    number = os.stat("/dev/null").st_rdev
    assert usage._users(Path("/dev/null")) == "by an overlay or another mount namespace, such as a container's"
    assert searched == [f" {os.major(number)}:{os.minor(number)} ".encode()] == [b" 1:3 "]
    elsewhere += ["in one", "in two"]
    assert usage._users(Path("/dev/null")) == "in one, in two"


def test_a_mount_namespace_is_asked_once_and_the_own_one_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process(number: int, namespace: str, mounts: str) -> None:
        directory = tmp_path / str(number)
        (directory / "ns").mkdir(parents=True)
        (directory / "ns" / "mnt").symlink_to(namespace)
        (directory / "mountinfo").write_text(mounts)
        (directory / "comm").write_text(f"name{number}\n")

    process(1, "mnt:[1]", "30 1 7:3 / /a rw\n")
    process(10, "mnt:[2]", "31 1 7:3 / /b rw\n")
    process(9, "mnt:[2]", "31 1 7:3 / /b rw\n")
    process(20, "mnt:[3]", "32 1 7:33 / /c rw\n")
    process(30, "mnt:[4]", "33 1 7:3 / /d rw\n")
    (tmp_path / "5").mkdir()  # ended meanwhile
    readlink = os.readlink
    monkeypatch.setattr(
        os, "readlink", lambda path: "mnt:[1]" if str(path).startswith("/proc/self") else readlink(path)
    )
    monkeypatch.setattr(usage, "Path", lambda path: tmp_path if path == "/proc" else Path(path))
    named = "in another mount namespace, that of process"
    assert namespaces_that_mount(b" 7:3 ") == [f"{named} 9 (name9)", f"{named} 30 (name30)"]


@pytest.mark.kernel
def test_another_mount_namespace_is_named_by_one_of_its_processes(tmp_path: Path) -> None:
    source = f"obdlab-{tmp_path.name}"
    script = f"mount -t tmpfs {source} {tmp_path} && echo mounted && read _"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mounted\n"
        wanted = [f"in another mount namespace, that of process {process.pid} (sh)"]
        assert namespaces_that_mount(f" {source} ".encode()) == wanted
        assert namespaces_that_mount(f" {source}-other ".encode()) == []
        process.communicate(b"\n", timeout=60)
    assert namespaces_that_mount(f" {source} ".encode()) == []
