"""The network of an experiment: a namespace for the registry, behind a link of a set rate and round-trip time.

::

    host  obdlab-Nh ═══ obdlab-Nr  namespace obdlab-N (registry; token bucket on what it sends)
    host  obdlab-Nh ═══ obdlab-Nx  namespace obdlab-Nd (delay bridge)  obdlab-Ny ═══ obdlab-Nr   with a round trip

The registry's address is inside 127.0.0.0/8 (sysctl route_localnet), where containerd and others use plain HTTP by
default. Each network has its own /24, so several can be up at once. The registry has a second address inside
198.18.0.0/15, which RFC 2544 reserves for benchmarks, for clients that insist on TLS and on a real address.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from obdlab.closing import Closing
from obdlab.lab.testbed import delay
from obdlab.lab.testbed.ownership import DEFAULT_STATE_DIR, Record, orphans
from obdlab.lab.testbed.process import Daemon, LabError, run, wait_until
from obdlab.lab.testbed.shaping import Shaping, drops, limit_rate, unlimit_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "obdlab-"
_MOST_NETWORKS = 4096
_MOST_RTT_MS = 10_000.0


@dataclass(frozen=True, slots=True)
class LinkCounters:
    """Counters of the host's end of the link, in bytes and packets (a large packet counts once)."""

    received: int
    sent: int
    received_packets: int
    sent_packets: int

    def since(self, earlier: LinkCounters) -> LinkCounters:
        """Return the difference to an earlier reading."""
        return LinkCounters(
            self.received - earlier.received,
            self.sent - earlier.sent,
            self.received_packets - earlier.received_packets,
            self.sent_packets - earlier.sent_packets,
        )


class ExperimentNetwork(Closing):
    """A network namespace behind a shaped link; a context manager that leaves nothing behind.

    ``rate_mbit`` limits what the namespace sends (0: no limit); ``rtt_ms`` is added to each round trip.
    """

    def __init__(self, rate_mbit: float = 0.0, rtt_ms: float = 0.0, state_dir: Path = DEFAULT_STATE_DIR) -> None:
        if not 0 <= rtt_ms <= _MOST_RTT_MS:
            raise LabError(f"round-trip time of a link: got {rtt_ms} ms, wanted between 0 and {_MOST_RTT_MS:g}")
        self.shaping = Shaping.of_rate(rate_mbit) if rate_mbit else None
        self.rtt_ms = rtt_ms
        self._state_dir = state_dir
        self._stack = ExitStack()
        self._number = -1

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._number = _claim_number()
            stack.callback(_remove_namespace, self.namespace)
            record = Record(self._state_dir, "network", self.namespace)
            stack.callback(record.remove)
            self._link(stack)
            if self.shaping is not None:
                limit_rate(self.enter, self._inner_interface, self.shaping)
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Take the network down, and end all processes in the namespace. Idempotent."""
        self._stack.close()

    @property
    def namespace(self) -> str:
        """The name of the registry's network namespace."""
        return f"{PREFIX}{self._number}"

    @property
    def address(self) -> str:
        """The registry's IP address, as the host reaches it."""
        return _address(self._number, 2)

    @property
    def benchmark_address(self) -> str:
        """The registry's second address, for clients that treat 127.0.0.0/8 as local."""
        return _benchmark_address(self._number, 2)

    @property
    def enter(self) -> tuple[str, ...]:
        """The words before a command that run it in the network namespace; its mounts stay the host's."""
        # "ip netns exec" would also remount /sys and use another mount namespace.
        return ("nsenter", f"--net=/run/netns/{self.namespace}", "--")

    def counters(self) -> LinkCounters:
        """Read the counters of the host's end of the link."""
        # /sys may show another network namespace than this process's (containers, unshare).
        name = f"{self.namespace}h:"
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            if line.lstrip().startswith(name):
                values = list(map(int, line.partition(":")[2].split()))
                return LinkCounters(values[0], values[8], values[1], values[9])
        raise LabError(f"{name[:-1]}: no such link (wanted the host's end of the experiment's network)")

    @contextmanager
    def unshaped(self) -> Iterator[None]:
        """Lift the rate limit inside the context, to push images."""
        if self.shaping is None:
            yield
            return
        unlimit_rate(self.enter, self._inner_interface)
        try:
            yield
        finally:
            limit_rate(self.enter, self._inner_interface, self.shaping)

    def facts(self) -> dict[str, Any]:
        """Return the facts about the link that the rows' environment records."""
        shaping = self.shaping
        return {
            "rate_mbit": shaping.rate_mbit if shaping else 0.0,
            "burst": shaping.burst if shaping else 0,
            "queue_limit": shaping.queue_limit if shaping else 0,
            "shaper": "tbf" if shaping else "",
            "rtt_ms": self.rtt_ms,
            "delay": "user-space bridge" if self.rtt_ms else "",
            "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
            "shaper_drops": drops(self.enter, self._inner_interface) if shaping else 0,
        }

    @property
    def _inner_interface(self) -> str:
        return f"{self.namespace}r"

    def _link(self, stack: ExitStack) -> None:
        outer, inner = f"{self.namespace}h", self._inner_interface
        if self.rtt_ms:
            middle = f"{self.namespace}d"
            run(["ip", "netns", "add", middle])
            stack.callback(_remove_namespace, middle)
            near, far = f"{self.namespace}x", f"{self.namespace}y"
            _add_link(outer, near, middle, stack)
            run(
                [
                    "ip",
                    "-n",
                    middle,
                    "link",
                    "add",
                    far,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    inner,
                    "netns",
                    self.namespace,
                ]
            )
            for interface in (near, far):
                _bring_up(("nsenter", f"--net=/run/netns/{middle}", "--"), interface)
            self._start_bridge(middle, near, far, stack)
        else:
            _add_link(outer, inner, self.namespace, stack)
        _bring_up(self.enter, inner, f"{self.address}/24")
        _bring_up((), outer, f"{_address(self._number, 1)}/32")
        # The table "local" sends all of 127.0.0.0/8 to lo; only a narrower route in that table wins.
        route = ("ip", "route", "add", f"{self.address}/32", "dev", outer, "src", _address(self._number, 1))
        run([*route, "table", "local"])
        run([*self.enter, "ip", "addr", "add", f"{self.benchmark_address}/30", "dev", inner])
        run(["ip", "addr", "add", f"{_benchmark_address(self._number, 1)}/30", "dev", outer])

    def _start_bridge(self, middle: str, near: str, far: str, stack: ExitStack) -> None:
        log = self._state_dir / f"{middle}.log"
        arguments = delay.command(near, far, self.rtt_ms / 2000)
        bridge = Daemon(
            "delay bridge", ["nsenter", f"--net=/run/netns/{middle}", "--", sys.executable, *arguments], log
        )
        stack.callback(log.unlink, missing_ok=True)
        stack.callback(bridge.stop)
        bridge.wait_for(lambda: delay.READY in log.read_text(), "start of the delay bridge")


def remove_orphans(state_dir: Path = DEFAULT_STATE_DIR) -> list[str]:
    """Take down the networks of killed experiments; return the networks' names."""
    removed = []
    for path, facts in orphans(state_dir, "network"):
        name = str(facts["name"])
        if name.startswith(PREFIX):
            for namespace in (name, f"{name}d"):
                _remove_namespace(namespace)
            Path(state_dir / f"{name}d.log").unlink(missing_ok=True)
            removed.append(name)
        path.unlink(missing_ok=True)
    return removed


def _claim_number() -> int:
    # "ip netns add" claims the number: it fails if the namespace exists.
    for number in range(_MOST_NETWORKS):
        if Path(f"/run/netns/{PREFIX}{number}").exists():
            continue
        try:
            run(["ip", "netns", "add", f"{PREFIX}{number}"])
        except LabError:
            if Path(f"/run/netns/{PREFIX}{number}").exists():  # another experiment was faster
                continue
            raise
        return number
    raise LabError(f"no free network (got {_MOST_NETWORKS} namespaces named {PREFIX}<number>)")


def _address(number: int, host: int) -> str:
    return f"127.{64 + number // 256}.{number % 256}.{host}"


def _benchmark_address(number: int, host: int) -> str:
    place = 4 * number + host
    return f"198.18.{place // 256}.{place % 256}"


def _add_link(outer: str, inner: str, namespace: str, stack: ExitStack) -> None:
    run(["ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", namespace])
    stack.callback(_delete_link, outer)


def _delete_link(outer: str) -> None:
    # Delete the link by name: the kernel deletes it with the namespace only some time later.
    with contextlib.suppress(OSError):  # gone with its namespace
        socket.if_nametoindex(outer)
        run(["ip", "link", "del", outer])


def _bring_up(enter: tuple[str, ...], interface: str, address: str = "") -> None:
    settings = (
        f"/proc/sys/net/ipv4/conf/{interface}/route_localnet",
        f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6",
    )
    script = "".join(f"if [ -e {path} ]; then echo 1 > {path}; fi; " for path in settings)
    if address:
        script += f"ip addr add {address} dev {interface}; "
    run([*enter, "sh", "-euc", f"{script} ip link set {interface} up"])


def _remove_namespace(namespace: str) -> None:
    if not Path(f"/run/netns/{namespace}").exists():
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _pids(namespace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        try:
            wait_until(lambda: not _pids(namespace), f"end of the processes in {namespace}", 5.0)
        except LabError:
            continue
        break
    _delete_link(f"{namespace}h")
    run(["ip", "netns", "del", namespace])


def _pids(namespace: str) -> list[int]:
    return [int(word) for word in run(["ip", "netns", "pids", namespace]).split()]
