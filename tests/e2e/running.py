"""Containers run by stock ctr, what must not be left of them, and waiting for it."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.system import mount
from tests.containerd_host import NAME, remove_containers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.containerd_host import ObdlabHost
    from tests.registry.server import RegistryServer

SLEEP = ("/bin/busybox", "sleep", "10000")


def own(name: str) -> str:
    """The container's name in containerd: runc knows containers by namespace and name, on the whole machine."""
    return f"{name}-{os.getpid()}"


def run(host: ObdlabHost, image: str, name: str, command: str, *options: str, check: bool = True) -> str:
    """Run a shell command in a new container; return what it printed."""
    arguments = ("run", "--rm", "--snapshotter", NAME, *options, image, own(name), "/bin/sh", "-c", command)
    return host.ctr(*arguments, check=check, timeout_s=240)


def start(host: ObdlabHost, image: str, name: str, *options: str) -> None:
    """Start a container that waits to be given commands."""
    host.ctr("run", "--detach", "--snapshotter", NAME, *options, image, own(name), *SLEEP)


def execute(host: ObdlabHost, name: str, command: str, *, check: bool = True) -> str:
    """Run a shell command in a running container; return what it printed."""
    arguments = ("tasks", "exec", "--exec-id", f"exec{abs(hash(command)):x}", own(name), "/bin/sh", "-c", command)
    return host.ctr(*arguments, check=check, timeout_s=240)


def stop(host: ObdlabHost, name: str) -> None:
    """Kill a container's process; the container stays."""
    host.ctr("tasks", "rm", "--force", own(name))


def remove(host: ObdlabHost, name: str) -> None:
    """Kill and remove a container."""
    stop(host, name)
    host.ctr("containers", "rm", own(name))


def device_mounts(host: ObdlabHost) -> list[Path]:
    """Where the snapshotter has devices mounted."""
    return [entry.mountpoint for entry in mount.mounts() if host.snapshotter.root in entry.mountpoint.parents]


def assert_nothing_left(host: ObdlabHost) -> None:
    """No container, snapshot, directory, mount or device."""
    assert host.ctr("containers", "ls", "-q") == ""
    assert host.ctr("images", "ls", "-q") == ""
    wait_for(lambda: list((host.snapshotter.root / "snapshots").iterdir()) == [])
    assert host.ctr("snapshots", "--snapshotter", NAME, "ls").splitlines()[1:] == []
    wait_for(lambda: host.snapshotter.devices.list() == [])
    assert device_mounts(host) == []


@contextmanager
def nothing_left(host: ObdlabHost) -> Iterator[None]:
    """Have a test leave nothing; what one that failed has left is taken away, for the next."""
    try:
        yield
        assert_nothing_left(host)
    finally:
        remove_containers(host)
        for lease in host.ctr("leases", "ls", "-q").split():
            host.ctr("leases", "rm", "--sync", lease)
        for image in host.ctr("images", "ls", "-q").split():
            host.ctr("images", "rm", "--sync", image)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def blob_bytes(server: RegistryServer) -> int:
    """What the registry has given out of blobs so far."""
    return sum(int(entry["written"]) for entry in server.requests() if "/blobs/" in entry["uri"])


def file_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
