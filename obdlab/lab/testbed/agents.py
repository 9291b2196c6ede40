"""Agents (``obdlab serve peer``) on the hosts of an experiment: started together, asked, and ended."""

from __future__ import annotations

import http.client
import os
import signal
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.closing import Closing
from obdlab.lab.testbed.process import Daemon, LabError
from obdlab.lab.testbed.registry import RegistryHost
from obdlab.system.processes import stat_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from obdlab.lab.testbed.hostnet import HostNetwork

PORT, PREFIX = 9731, "peer"
# Of agents that start together: each takes a second of a processor.
_START_S = 180.0
_ANSWER_S = 10.0
_PUBLIC_KEY = b"an experiment's key: it keeps no secret\n"


class SharedRegistry(RegistryHost):
    """A registry at every address of its namespace: the lab pushes past the links, hosts read through them."""

    def _configuration(self, host: str, http: dict[str, Any]) -> dict[str, Any]:
        found = super()._configuration(host, http)
        return {**found, "http": {**found["http"], "addr": f":{self.port}"}}


class Agents(Closing):
    """One agent on each of some hosts, which end with it. ``directory`` gets their caches and logs."""

    def __init__(self, network: HostNetwork, names: Sequence[str], registry: str, directory: Path) -> None:
        self.names = tuple(names)
        self._network, self._registry, self._directory = network, registry, directory
        self._daemons: dict[str, Daemon] = {}

    def start(self, *options: str) -> None:
        """Start all agents with these options, and wait until each answers. Raises LabError."""
        members, key = self._directory / "members", self._directory / "key"
        members.write_text("".join(f"{name}@{self.address(name)}\n" for name in self.names))
        (self._directory / "config.json").write_text("{}")
        key.touch(0o600)
        key.write_bytes(_PUBLIC_KEY)
        for name in self.names:
            command = [
                *self._network.enter(name),
                *(sys.executable, "-m", "obdlab", "serve", "peer", "--listen", self.address(name), "--id", name),
                *("--registry", self._registry, "--plain-http", self._registry, "--members", f"file:{members}"),
                *("--cache-dir", str(self._directory / f"cache-{name}"), "--log-level", "warning"),
                *("--prefix", PREFIX, "--key", str(key), *options),
            ]
            # No credentials of this user.
            environment = {"DOCKER_CONFIG": str(self._directory)}
            log = self._directory / f"{name}.log"
            self._daemons[name] = Daemon(f"agent {name}", command, log, environment)
        for name, daemon in self._daemons.items():
            with self._network.on(name):
                daemon.wait_for(partial(self._is_alive, name), "an answer", _START_S)

    def close(self) -> None:
        """End all agents, together. Idempotent."""
        for daemon in self._daemons.values():
            if daemon.is_running():
                os.kill(daemon.pid, signal.SIGTERM)
        for daemon in self._daemons.values():
            daemon.stop()
        self._daemons.clear()

    def address(self, name: str) -> str:
        """Return ``host:port`` of a host's agent."""
        return f"{self._network.address(name)}:{PORT}"

    def metrics(self, name: str) -> dict[str, float]:
        """Return an agent's metrics, without ``obdlab_peer_``; it shows them to its own host. Raises LabError."""
        try:
            with self._network.on(name):
                lines = self._get(name, "/metrics").decode().splitlines()
        except (OSError, http.client.HTTPException) as error:
            raise LabError(f"agent {name}: no metrics: {error}") from error
        pairs = [line.removeprefix("obdlab_peer_").rpartition(" ") for line in lines if not line.startswith("#")]
        return {key: float(value) for key, _, value in pairs}

    def cpu_s(self) -> float:
        """Return the processor time of all agents so far, in seconds."""
        return sum(stat.cpu_s for daemon in self._daemons.values() if (stat := stat_of(daemon.pid)) is not None)

    def warnings(self) -> int:
        """Return the number of lines that all agents have logged; they log only warnings and errors."""
        return sum(len(path.read_bytes().splitlines()) for path in self._directory.glob("*.log"))

    def _is_alive(self, name: str) -> bool:
        try:
            self._get(name, "/alive")
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
            return False
        return True

    def _get(self, name: str, path: str) -> bytes:
        host, _, port = self.address(name).rpartition(":")
        with closing(http.client.HTTPConnection(host, int(port), timeout=_ANSWER_S)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read()


def busy_s() -> tuple[float, float]:
    """Return the busy and the whole time of all processors so far, in seconds; other programs' included."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / per_second, sum(ticks) / per_second


def total(metrics: Mapping[str, Mapping[str, float]], key: str) -> float:
    """Return the sum of one metric over all hosts."""
    return sum(each.get(key, 0.0) for each in metrics.values())
