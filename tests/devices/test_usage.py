"""Mounts that hold a device, in this mount namespace and in others."""

from __future__ import annotations

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
