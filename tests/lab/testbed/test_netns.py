from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.shaping import Shaping

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 4000
_SERVER = """
import socket, sys, threading
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
def serve(connection):
    with connection:
        wanted = connection.recv(16)
        if wanted:
            connection.sendall(bytes(int(wanted)))
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


@contextmanager
def serving(network: ExperimentNetwork) -> Iterator[None]:
    command = [*network.enter, sys.executable, "-c", _SERVER, network.address, str(PORT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        try:
            yield
        finally:
            server.kill()  # or a failure would wait for its end


def fetch(network: ExperimentNetwork, size: int) -> float:
    """Seconds from the request to its last byte."""
    with socket.create_connection((network.address, PORT), timeout=60) as connection:
        began = time.perf_counter()
        connection.sendall(str(size).encode())
        got = 0
        while chunk := connection.recv(1 << 18):
            got += len(chunk)
        assert got == size
        return time.perf_counter() - began


def connect(network: ExperimentNetwork) -> float:
    began = time.perf_counter()
    with socket.create_connection((network.address, PORT), timeout=60):
        return time.perf_counter() - began


def names() -> set[str]:
    links = {name for _, name in socket.if_nameindex()}
    spaces = {path.name for path in Path("/run/netns").glob("*")}
    return {name for name in links | spaces if name.startswith("obdlab-")}


@pytest.mark.kernel
def test_a_round_trip_is_never_shorter_than_asked(state_dir: Path) -> None:
    with ExperimentNetwork(rtt_ms=20, state_dir=state_dir) as network, serving(network):
        connect(network)
        fastest = min(connect(network) for _ in range(10))
        # A busy machine can only make it longer; 10 times it would be another fault.
        assert 0.0199 < fastest < 0.2


@pytest.mark.kernel
def test_a_rate_is_never_exceeded_and_can_be_lifted(state_dir: Path) -> None:
    size = 3 << 20
    with ExperimentNetwork(rate_mbit=40, state_dir=state_dir) as network, serving(network):
        assert network.shaping is not None
        least_s = (size - network.shaping.burst) * 8 / 40e6
        assert fetch(network, size) > least_s
        with network.unshaped():
            assert min(fetch(network, size) for _ in range(3)) < least_s
        assert fetch(network, size) > least_s


@pytest.mark.kernel
def test_everything_that_is_sent_arrives_through_the_bridge(state_dir: Path) -> None:
    with ExperimentNetwork(rate_mbit=500, rtt_ms=4, state_dir=state_dir) as network, serving(network):
        before = network.counters()
        sizes = [1, 1447, 1449, 65_535, 65_537, 1 << 20]
        threads = [threading.Thread(target=fetch, args=(network, size)) for size in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        fetch(network, 5 << 20)
        passed = network.counters().since(before)
        payload = sum(sizes) + (5 << 20)
        assert payload <= passed.received < payload * 1.2 + 10_000
        assert 0 < passed.sent < payload


@pytest.mark.kernel
def test_networks_coexist_and_leave_nothing(state_dir: Path) -> None:
    before = names()
    with ExperimentNetwork(state_dir=state_dir) as first, ExperimentNetwork(rtt_ms=2, state_dir=state_dir) as second:
        assert first.address != second.address
        assert {first.namespace, second.namespace} <= names()
        with serving(first), serving(second):
            connect(first)
            connect(second)
        assert first.facts()["rate_mbit"] == 0.0
        assert second.facts()["rtt_ms"] == 2
        assert second.facts()["congestion_control"]
        mine = {name for name in names() if name.startswith((first.namespace, second.namespace))}
    assert not mine & (names() - before)


@pytest.mark.kernel
def test_processes_in_the_namespace_end_with_it(state_dir: Path) -> None:
    with ExperimentNetwork(state_dir=state_dir) as network:
        child = subprocess.Popen([*network.enter, "sleep", "600"])
        namespace = network.namespace
        while str(child.pid) not in subprocess.check_output(["ip", "netns", "pids", namespace], text=True).split():
            assert child.poll() is None
    assert child.wait(30) != 0
    assert not Path(f"/run/netns/{namespace}").exists()


@pytest.mark.parametrize("rate", [-1.0, 0.05, 1e9, float("nan")])
def test_rates_out_of_reach_are_refused(rate: float) -> None:
    with pytest.raises(LabError, match="rate of a link"):
        Shaping.of_rate(rate)


@pytest.mark.parametrize("rtt", [-1.0, 1e6, float("nan")])
def test_round_trips_out_of_reach_are_refused(rtt: float) -> None:
    with pytest.raises(LabError, match="round-trip time"):
        ExperimentNetwork(rtt_ms=rtt)


def test_the_burst_is_a_millisecond_with_a_floor() -> None:
    assert Shaping.of_rate(100).burst == 16384
    assert Shaping.of_rate(1000).burst == 125_000
    assert Shaping.of_rate(100).gso_size == 16384
    assert Shaping.of_rate(1000).gso_size == 65536
