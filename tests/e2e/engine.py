"""A Docker Engine of the test's own on a containerd of the test's own: no bridge, no packet filter rules."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.system import mount
from tests.containerd_host import NAME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.containerd_host import ObdlabHost

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0


class DockerEngine:
    """The engine behind a socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def docker(self, *arguments: str, check: bool = True) -> str:
        """Run docker's command line and return what it printed."""
        done = subprocess.run(
            ["docker", "--host", f"unix://{self._socket}", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"docker {arguments}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr


@contextmanager
def running_docker(directory: Path, host: ObdlabHost, snapshotter: str = NAME) -> Iterator[DockerEngine]:
    """Run dockerd below ``directory`` with the containerd image store on obdlab's snapshotter."""
    directory.mkdir(parents=True)
    exec_root, log = directory / "exec", directory / "dockerd.log"
    configuration = {
        "features": {"containerd-snapshotter": True},
        "storage-driver": snapshotter,
        "containerd": host.containerd.address,
        "containerd-namespace": "test",
        "containerd-plugins-namespace": "test-plugins",
        "iptables": False,
        "ip6tables": False,
        "bridge": "none",
        "data-root": str(directory / "root"),
        "exec-root": str(exec_root),
        "pidfile": str(directory / "docker.pid"),
        "hosts": [f"unix://{directory}/docker.sock"],
    }
    (directory / "daemon.json").write_text(json.dumps(configuration))
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["dockerd", "--config-file", str(directory / "daemon.json")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        engine = DockerEngine(directory / "docker.sock")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while "Server Version" not in engine.docker("info", check=False):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
        yield engine
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        finally:
            process.kill()
            process.wait(_STOP_TIMEOUT_S)
            for entry in mount.mounts():  # the host's network namespace, kept for the next start
                if exec_root in entry.mountpoint.parents:
                    mount.unmount(entry.mountpoint, lazy=True)
