"""A containerd of its own with our snapshotter as proxy plugin "obdlab", all below a directory of the test's.

``containerd_with_obdlab(directory)`` runs both; the snapshotter is a process apart that tests may kill and restart.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.containerd.client import Containerd
from obdlab.pull.rpull import PullResult, rpull
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests.containerd.host import ContainerdHost, running_containerd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NAME = "obdlab"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0


class SnapshotterProcess:
    """``obdlab serve snapshotter`` with root, socket, run directory and cache below one directory."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.root = directory / "root"
        self.address = directory / "s.sock"
        self.run_dir = directory / "run"
        self.log = directory / "snapshotter.log"
        self.devices = DeviceService(self.run_dir, Settings(cache_dir=directory / "cache"))
        self._arguments = [
            *("--root", str(self.root), "--address", str(self.address)),
            *("--run-dir", str(self.run_dir), "--cache-dir", str(directory / "cache")),
            *arguments,
        ]
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def command(self) -> list[str]:
        """What is run."""
        return [sys.executable, "-m", "obdlab", "-v", "serve", "snapshotter", *self._arguments]

    def start(self) -> None:
        """Start it and wait for its ready line."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
            )
        os.set_blocking(self._stdout.fileno(), False)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while "ready" not in (line := self._stdout.readline()):
            assert self._process.poll() is None, f"ended: {line}{self.log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.01)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status; 0 if it does not run."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_TIMEOUT_S)
            raise
        finally:
            assert process.stdout is not None
            process.stdout.close()

    def take_down(self) -> None:
        """Stop it and everything that outlives it on purpose: mounts and devices."""
        self.stop()
        for entry in reversed(mount.mounts()):
            if self.root in entry.mountpoint.parents:
                mount.unmount(entry.mountpoint, lazy=True)
        self.devices.shutdown(force=True)

    @property
    def _stdout(self):
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout


@dataclass(frozen=True)
class ObdlabHost:
    """A containerd and the snapshotter it uses."""

    containerd: ContainerdHost
    snapshotter: SnapshotterProcess
    name: str = NAME

    def ctr(self, *arguments: str, timeout_s: float = 60.0, check: bool = True) -> str:
        """Run stock ctr in the namespace "test" and return what it printed."""
        return self.containerd.ctr("--namespace", "test", *arguments, timeout_s=timeout_s, check=check)

    def start_snapshotter(self) -> None:
        """Start the snapshotter again, and wait until containerd reaches it, if one runs.

        containerd that was refused a connection refuses calls itself, for a second and then longer and longer.
        """
        self.snapshotter.start()
        if not self.containerd.runs:
            return
        deadline = time.monotonic() + _START_TIMEOUT_S
        listing = ("--namespace", "test", "snapshots", "--snapshotter", self.name, "ls")
        while True:
            done = subprocess.run(
                ["ctr", "--address", self.containerd.address, *listing], capture_output=True, text=True, timeout=60
            )
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.1)

    def rpull(self, reference: str, namespace: str = "test", *, download: bool = False) -> PullResult:
        """Pull lazily, or with the blobs."""
        with (
            Containerd(self.containerd.address, namespace) as client,
            closing(RegistryClient(Credentials.load(None))) as registry,
        ):
            return rpull(
                client,
                registry,
                Reference.parse(reference),
                snapshotter=self.name,
                platform=host_platform(),
                download=download,
            )


@contextmanager
def containerd_with_obdlab(
    directory: Path,
    *arguments: str,
    sandbox_image: str = "",
    differ: Mapping[str, object] | None = None,
    name: str = NAME,
) -> Iterator[ObdlabHost]:
    """Run both below ``directory`` and leave nothing of them behind. ``arguments`` are the snapshotter's.

    With ``sandbox_image`` containerd also serves kubelets, with pods on that image. With ``differ``, keys of the
    snapshotter's configuration file, the snapshotter is containerd's differ too. ``name`` is the
    snapshotter's in containerd.
    """
    if differ is not None:
        config = directory / "snapshotter.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps({"containerdAddress": str(directory / "containerd/c.sock"), **differ}))
        arguments = ("--config", str(config), *arguments)
    snapshotter = SnapshotterProcess(directory / "snapshotter", *arguments)
    with ExitStack() as stack:
        stack.callback(snapshotter.take_down)
        snapshotter.start()
        proxies, cri = {name: str(snapshotter.address)}, name if sandbox_image else ""
        host = stack.enter_context(
            running_containerd(
                directory / "containerd",
                proxies,
                cri=cri,
                sandbox_image=sandbox_image,
                differ="" if differ is None else str(snapshotter.address),
                transfers=bool(differ and differ.get("convertLayers")),
            )
        )
        running = ObdlabHost(host, snapshotter, name)
        stack.callback(remove_containers, running)
        yield running


def remove_containers(host: ObdlabHost) -> None:
    """Kill and remove all containers, those of pods as well."""
    for namespace in host.containerd.ctr("namespaces", "ls", "-q").split():
        ctr = partial(host.containerd.ctr, "--namespace", namespace)
        for task in ctr("tasks", "ls", "-q").split():
            ctr("tasks", "kill", "-s", "KILL", task, check=False)
            ctr("tasks", "rm", "-f", task, check=False)
        for container in ctr("containers", "ls", "-q").split():
            ctr("containers", "rm", container, check=False)
