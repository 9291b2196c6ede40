"""A Docker Engine of an experiment's own: no bridge, no packet filter rules, and nothing left of it afterwards."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from obdlab.closing import Closing
from obdlab.lab.testbed.ownership import DEFAULT_STATE_DIR
from obdlab.lab.testbed.process import Daemon, LabError, run
from obdlab.lab.testbed.takedown import unmount_below

if TYPE_CHECKING:
    from collections.abc import Mapping

_START_S = 60.0
_STOP_S = 30.0

_INSTALL = "apt-get install docker.io docker-buildx (optional: its service changes the host's packet filters)"
#: Programs of a Docker Engine, each with the way to get it.
PROGRAMS = {"dockerd": _INSTALL, "docker": _INSTALL}


class DockerEngine(Closing):
    """dockerd below ``directory``, which must be new; a context manager that removes the directory.

    By default it runs a containerd of its own and stores images with overlay2. ``changes`` are keys of its
    configuration that differ. If this process is killed, the engine ends.
    """

    def __init__(self, directory: Path, changes: Mapping[str, Any] | None = None) -> None:
        self.directory = directory
        self._changes = changes or {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the engine. Raises LabError."""
        with ExitStack() as stack:
            self.directory.mkdir(parents=True)
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            # Paths of sockets must be short.
            DEFAULT_STATE_DIR.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(prefix="docker-", dir=DEFAULT_STATE_DIR, ignore_cleanup_errors=True)
            self._state = Path(stack.enter_context(made))
            # Mounts are left for the next start: the host's network namespace, and those of a killed engine.
            stack.callback(unmount_below, [self.directory, self._state])
            file = self.directory / "daemon.json"
            file.write_text(json.dumps(self._configuration()))
            command = ("setpriv", "--pdeathsig", "TERM", "--", "dockerd", "--config-file", str(file))
            daemon = Daemon("dockerd", command, self.directory / "dockerd.log")
            stack.callback(daemon.stop, _STOP_S)
            daemon.wait_for(self._answers, "answer on its socket", _START_S)
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Stop the engine and remove its directory. Idempotent."""
        self._stack.close()

    def docker(self, *arguments: str | Path, timeout_s: float = 120.0) -> str:
        """Run docker's command line and return its output. Raises LabError if it fails or takes too long."""
        return run([*self.command, *arguments], timeout_s=timeout_s)

    def has_buildkit(self) -> bool:
        """Return True if this host has docker's client for BuildKit."""
        try:
            return "buildx" in self.docker("buildx", "version")
        except LabError:
            return False

    @property
    def command(self) -> tuple[str, ...]:
        """The words of docker's command line before its arguments."""
        return ("docker", "--host", f"unix://{self._socket}")

    @property
    def _socket(self) -> Path:
        return self._state / "docker.sock"

    def _answers(self) -> bool:
        try:
            return "Server Version" in self.docker("info", timeout_s=10.0)
        except LabError:
            return False

    def _configuration(self) -> dict[str, Any]:
        return {
            "storage-driver": "overlay2",
            "iptables": False,
            "ip6tables": False,
            "bridge": "none",
            "data-root": str(self.directory / "root"),
            "exec-root": str(self._state / "exec"),
            "pidfile": str(self.directory / "docker.pid"),
            "hosts": [f"unix://{self._socket}"],
            **self._changes,
        }
