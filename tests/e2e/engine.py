"""A Docker Engine of the test's own on a containerd of the test's own."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from obdlab.lab.testbed import dockerengine
from tests.containerd_host import NAME

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.containerd_host import ObdlabHost


class DockerEngine:
    """The command line of an engine."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command

    def docker(self, *arguments: str, check: bool = True) -> str:
        """Run docker's command line and return what it printed."""
        done = subprocess.run(
            [*self._command, *arguments],
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
    changes = {
        "features": {"containerd-snapshotter": True},
        "storage-driver": snapshotter,
        "containerd": host.containerd.address,
        "containerd-namespace": "test",
        "containerd-plugins-namespace": "test-plugins",
    }
    with dockerengine.DockerEngine(directory, changes) as engine:
        yield DockerEngine(engine.command)
