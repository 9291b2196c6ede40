"""Emulated hosts: addresses, rates, and nothing left behind."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obdlab.lab.testbed.hostnet import ORIGIN, HostNetwork
from obdlab.lab.testbed.process import LabError
from tests.lab.testbed.test_netns import names

SIZE = 1 << 20


@contextmanager
def sending(network: HostNetwork, name: str, address: str) -> Iterator[int]:
    """Send SIZE bytes to everyone who connects to a host; yield the port."""
    with network.on(name):
        server = socket.create_server((address, 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(bytes(SIZE))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)


def fetch(network: HostNetwork, name: str, address: str, port: int) -> float:
    """Seconds in which a host gets SIZE bytes."""
    with network.on(name):
        connection = socket.create_connection((address, port), timeout=60)
    with connection:
        began, got = time.perf_counter(), 0
        while chunk := connection.recv(1 << 16):
            got += len(chunk)
        assert got == SIZE
        return time.perf_counter() - began


@pytest.mark.kernel
def test_hosts_have_their_own_rates_and_leave_nothing(tmp_path: Path) -> None:
    before = names()
    with HostNetwork({"a": 40.0, "b": 10.0}, 20.0, state_dir=tmp_path) as network:
        mine = {name for name in names() if name.startswith(network.registry.namespace)} - before
        with sending(network, "a", network.address("a")) as port:
            # The receiver's link is the narrower one; the lab itself is on none of them.
            assert fetch(network, "b", network.address("a"), port) > (SIZE - 40_000) * 8 / 10e6
            with pytest.raises(OSError):
                socket.create_connection((network.address("a"), port), timeout=0.3)
        assert network.drops() >= 0
        assert network.facts()["shaper"] == "tbf"
        with pytest.raises(LabError, match="no such host"), network.on("c"):
            pass
        assert len(list(tmp_path.glob("network-*.json"))) == 3
    assert not mine & names()
    assert not list(tmp_path.glob("network-*.json"))


@pytest.mark.kernel
def test_the_registry_is_as_far_as_asked(tmp_path: Path) -> None:
    with HostNetwork({"a": 1000.0}, 1000.0, 20.0, state_dir=tmp_path) as network:
        with network.on("a"):
            for _ in range(3):  # the first one asks for the address too
                began = time.perf_counter()
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((ORIGIN, 9), timeout=30)
                took = time.perf_counter() - began
        assert 0.0199 < took < 0.2


def test_a_number_of_hosts_has_bounds() -> None:
    with pytest.raises(LabError, match="hosts of a network"):
        HostNetwork({}, 10.0)
    with pytest.raises(LabError, match="rate of a link"):
        HostNetwork({"a": 0.0}, 10.0)
