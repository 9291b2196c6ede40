"""How true the experiment's network is: round-trip time and rate asked for, against those measured. Needs root."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from obdlab.lab.testbed.netns import ExperimentNetwork

PORT = 4000
SERVER = """
import socket, sys, threading
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
data = bytes(1 << 20)
def serve(connection):
    with connection:
        for _ in range(int(connection.recv(16) or 0)):
            connection.sendall(data)
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""


def connect_ms(network: ExperimentNetwork) -> float:
    began = time.perf_counter()
    with socket.create_connection((network.address, PORT), timeout=30):
        return (time.perf_counter() - began) * 1e3


def rate_mbit(network: ExperimentNetwork, mebibytes: int) -> float:
    with socket.create_connection((network.address, PORT), timeout=30) as connection:
        began = time.perf_counter()
        connection.sendall(str(mebibytes).encode())
        got = 0
        while chunk := connection.recv(1 << 20):
            got += len(chunk)
        return got * 8 / (time.perf_counter() - began) / 1e6


def measure(rate: float, rtt: float) -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        ExperimentNetwork(rate, rtt, Path(directory)) as network,
        subprocess.Popen(
            [*network.enter, sys.executable, "-c", SERVER, network.address, str(PORT)],
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        assert server.stdout is not None
        server.stdout.readline()
        connect_ms(network)  # the first one asks for addresses
        rtts = [connect_ms(network) for _ in range(50)]
        rates = [rate_mbit(network, 8 if 0 < rate <= 100 else 32) for _ in range(3)]
        server.kill()
    print(
        f"asked {rate:6g} Mbit/s {rtt:3g} ms: connect {statistics.median(rtts):6.2f} ms "
        f"(min {min(rtts):.2f}, p90 {sorted(rtts)[45]:.2f}), payload {statistics.median(rates):6.1f} Mbit/s"
    )


if __name__ == "__main__":
    for asked in ((0, 0), (100, 0), (100, 5), (1000, 5), (0, 5), (1000, 20)):
        measure(*asked)
