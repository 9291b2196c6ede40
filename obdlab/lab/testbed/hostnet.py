"""Hosts as network namespaces on one bridge, each behind a link of its own rate, and a registry on the same bridge.

::

    obdlab-Nh0 eth0 ═══ hosts-h0 ┐
    obdlab-Nh1 eth0 ═══ hosts-h1 ┤ bridge "hosts", in the registry's namespace obdlab-N
                        origin-b ┴═══ origin  (10.77.0.1: the registry)
                        origin-b ┴═══ delay bridge ═══ origin   with a round trip

Token buckets limit the packets to and from each host, and those from the registry. The lab reaches the registry past
all of them, by the experiment's network that the namespace belongs to.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from obdlab.closing import Closing
from obdlab.lab.testbed import delay
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.ownership import DEFAULT_STATE_DIR, Record
from obdlab.lab.testbed.process import Daemon, LabError, run
from obdlab.lab.testbed.shaping import Shaping, drops, limit_rate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: The registry's address, as hosts reach it.
ORIGIN = "10.77.0.1"
_MOST_HOSTS = 250
_CLONE_NEWNET = 0x40000000


class HostNetwork(Closing):
    """Namespaces by the names of their hosts; a context manager that leaves nothing behind.

    ``rates_mbit`` has each host's rate, either way; ``origin_mbit`` is the registry's, and ``origin_rtt_ms`` the time
    that is added to each round trip to it.
    """

    def __init__(
        self,
        rates_mbit: Mapping[str, float],
        origin_mbit: float,
        origin_rtt_ms: float = 0.0,
        state_dir: Path = DEFAULT_STATE_DIR,
    ) -> None:
        if not 1 <= len(rates_mbit) <= _MOST_HOSTS:
            raise LabError(f"hosts of a network: wanted 1 to {_MOST_HOSTS} (got {len(rates_mbit)})")
        self._rates = {name: Shaping.of_rate(rate) for name, rate in rates_mbit.items()}
        self._origin, self._origin_rtt_ms = Shaping.of_rate(origin_mbit), origin_rtt_ms
        self._state_dir = state_dir
        #: The registry's namespace, whose address the lab reaches without any limit.
        self.registry = ExperimentNetwork(state_dir=state_dir)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.registry)
            run([*self._inside, "ip", "link", "add", "hosts", "type", "bridge"])
            self._up(self._inside, "hosts")
            self._connect_registry(stack)
            for number, name in enumerate(self._rates):
                self._connect(number, name, stack)
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Take all namespaces down. Idempotent."""
        self._stack.close()

    def address(self, name: str) -> str:
        """Return a host's IP address."""
        return f"10.77.1.{1 + list(self._rates).index(name)}"

    def enter(self, name: str) -> tuple[str, ...]:
        """Return the words before a command that run it on a host; its mounts stay the machine's."""
        return ("nsenter", f"--net={self._path(name)}", "--")

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Make the sockets that the calling thread opens inside the block those of a host. Raises LabError."""
        try:
            here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            there = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LabError(f"{name}: {error.strerror}: no such host") from error
        try:
            _enter(there)
            yield
        finally:
            _enter(here)
            os.close(here)
            os.close(there)

    def facts(self) -> dict[str, Any]:
        """Return the facts about the links that the rows' environment records."""
        return {
            "hosts": "network namespaces of one machine",
            "shaper": "tbf",
            "burst": max(shaping.burst for shaping in self._rates.values()),
            "origin_delay": "user-space bridge" if self._origin_rtt_ms else "",
            "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        }

    def drops(self) -> int:
        """Return the number of packets that all shapers have dropped so far."""
        found = drops(self._inside, "origin")
        for name in self._rates:
            found += drops(self.enter(name), "eth0") + drops(self._inside, _port(name))
        return found

    @property
    def _inside(self) -> tuple[str, ...]:
        return self.registry.enter

    def _namespace(self, name: str) -> str:
        return f"{self.registry.namespace}{name}"

    def _path(self, name: str) -> str:
        return f"/run/netns/{self._namespace(name)}"

    def _connect_registry(self, stack: ExitStack) -> None:
        inside, near, far = self._inside, "origin-x", "origin-y"
        if self._origin_rtt_ms:
            run([*inside, "ip", "link", "add", "origin", "type", "veth", "peer", "name", near])
            run([*inside, "ip", "link", "add", far, "type", "veth", "peer", "name", "origin-b"])
            self._up(inside, near)
            self._up(inside, far)
            log = self._state_dir / f"{self.registry.namespace}o.log"
            stack.callback(log.unlink, missing_ok=True)
            arguments = delay.command(near, far, self._origin_rtt_ms / 2000)
            bridge = Daemon("delay bridge", [*inside, sys.executable, *arguments], log)
            stack.callback(bridge.stop)
            bridge.wait_for(lambda: delay.READY in log.read_text(), "start of the delay bridge")
        else:
            run([*inside, "ip", "link", "add", "origin", "type", "veth", "peer", "name", "origin-b"])
        run([*inside, "ip", "link", "set", "origin-b", "master", "hosts"])
        self._up(inside, "origin-b")
        self._up(inside, "origin", ORIGIN)
        limit_rate(inside, "origin", self._origin)

    def _connect(self, number: int, name: str, stack: ExitStack) -> None:
        namespace, port, shaping = self._namespace(name), _port(name), self._rates[name]
        # Left by a killed experiment, it is removed as the registry's namespace is.
        record = Record(self._state_dir, "network", namespace)
        stack.callback(record.remove)
        run(["ip", "netns", "add", namespace])
        stack.callback(run, ["ip", "netns", "del", namespace])
        peer = ("peer", "name", "eth0", "netns", namespace)
        run(["ip", "-n", self.registry.namespace, "link", "add", port, "type", "veth", *peer])
        run([*self._inside, "ip", "link", "set", port, "master", "hosts"])
        self._up(self._inside, port)
        enter = self.enter(name)
        self._up(enter, "lo")
        self._up(enter, "eth0", f"10.77.1.{number + 1}")
        limit_rate(enter, "eth0", shaping)
        limit_rate(self._inside, port, shaping)

    # IPv6 would announce itself on every link.
    def _up(self, enter: tuple[str, ...], interface: str, address: str = "") -> None:
        setting = f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"
        script = f"if [ -e {setting} ]; then echo 1 > {setting}; fi; "
        script += f"ip addr add {address}/16 dev {interface}; " if address else ""
        run([*enter, "sh", "-euc", f"{script} ip link set {interface} up"])


# setns(2), for the calling thread; Python has it from 3.12 on.
def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        raise LabError(f"network namespace: {os.strerror(ctypes.get_errno())}")


def _port(name: str) -> str:
    return f"hosts-{name}"
