"""Starts of one image on 1 to N hosts, each a network namespace behind a slow link, with and without peers.

Every host has an agent and a reader, which replays the same reads in the same order: extents of 256 KiB, two at a
time, as a device would. Needs root; run it in a network namespace of its own::

    python -m tests.benchmarks.peers --hosts 1 2 4 8 16 --topologies none rendezvous

A row has the seconds until the first, the median and the last host had its working set, the bytes that the registry
sent as multiples of a working set, the copies of a block that left the busiest host, and the share of the processors
that was busy: beyond 0.7 the machine is measured, and not the links.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from obdlab.lab.testbed.process import run
from obdlab.lab.testbed.shaping import Shaping, limit_rate
from tests.peers.agent.swarm import Swarm, key_file, make_image
from tests.registry import faulty
from tests.registry.faulty import FaultyRegistry

EXTENT = 256 << 10
PORT = 9731
WAIT_S = 120.0


def in_namespace(name: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", name)


def connect(name: str, address: str, bridge: str, mbit: float) -> None:
    """Make a namespace with a link to the bridge, limited in both directions."""
    run(["ip", "netns", "add", name])
    run(["ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name])
    run(["ip", "link", "set", f"v{name}", "master", bridge, "up"])
    enter = in_namespace(name)
    run([*enter, "ip", "link", "set", "lo", "up"])
    run([*enter, "ip", "address", "add", f"{address}/16", "dev", "eth0"])
    run([*enter, "ip", "link", "set", "eth0", "up"])
    limit_rate(enter, "eth0", Shaping.of_rate(mbit))
    limit_rate((), f"v{name}", Shaping.of_rate(mbit))


def busy_s() -> tuple[float, float]:
    """Return the busy and the whole time of all processors so far."""
    times = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return float(sum(times) - times[3] - times[4]), float(sum(times))


class Hosts:
    """Namespaces on one bridge, "h0" and so on; the registry, in this process, has the address 10.77.0.1."""

    def __init__(self, count: int, host_mbit: float, origin_mbit: float, stack: ExitStack) -> None:
        run(["ip", "link", "add", "obr", "type", "bridge"])
        stack.callback(run, ["ip", "link", "del", "obr"])
        run(["ip", "link", "set", "obr", "up"])
        # The registry's process stays here, behind a link of its own.
        run(["ip", "link", "add", "vorigin", "type", "veth", "peer", "name", "origin"])
        stack.callback(run, ["ip", "link", "del", "vorigin"])
        run(["ip", "link", "set", "vorigin", "master", "obr", "up"])
        run(["ip", "address", "add", "10.77.0.1/16", "dev", "origin"])
        run(["ip", "link", "set", "origin", "up"])
        limit_rate((), "origin", Shaping.of_rate(origin_mbit))
        self.names = [f"h{number}" for number in range(count)]
        self.addresses = {name: f"10.77.1.{number + 1}:{PORT}" for number, name in enumerate(self.names)}
        for name, address in self.addresses.items():
            stack.callback(run, ["ip", "netns", "del", name])
            connect(name, address.partition(":")[0], "obr", host_mbit)


class NamespaceSwarm(Swarm):
    """Agents in namespaces."""

    def start(self, id_: str, *options: str) -> None:
        with (self.directory / f"{id_}.log").open("ab") as log:
            self.processes[id_] = subprocess.Popen(
                [
                    *in_namespace(id_),
                    *(sys.executable, "-m", "obdlab", "serve", "peer", "--listen", self.addresses[id_], "--id", id_),
                    *("--registry", self.registry.host, "--plain-http", self.registry.host),
                    *("--members", f"file:{self.directory / 'members'}", "--log-level", "warning"),
                    *("--cache-dir", str(self.directory / id_), *options),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "DOCKER_CONFIG": str(self.directory)},
            )


class Registry(FaultyRegistry):
    """The tests' registry at the bench's address."""

    @property
    def host(self) -> str:
        return f"10.77.0.1:{self.port}"


READER = """
import http.client, json, sys, threading, time
address, path, headers, offsets, length, size, start_at = json.loads(sys.argv[1])
def read(part):
    connection = http.client.HTTPConnection(address, timeout=120)
    for offset in part:
        last = min(offset + length, size) - 1
        connection.request("GET", path, headers={**headers, "Range": f"bytes={offset}-{last}"})
        data = connection.getresponse().read()
        assert len(data) == min(length, size - offset), len(data)
print("up", flush=True)
time.sleep(max(0.0, start_at - time.monotonic()))
began = time.monotonic()
# The second reader is one extent behind the first.
threads = [threading.Thread(target=read, args=(offsets[number::2],)) for number in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(time.monotonic() - began, flush=True)
"""


def measure(
    count: int, topology: str, arity: int, size: int, host_mbit: float, origin_mbit: float, directory: Path
) -> dict[str, object]:
    """Return the row of one start."""
    with ExitStack() as stack:
        hosts = Hosts(count, host_mbit, origin_mbit, stack)
        registry = stack.enter_context(serving())
        image = make_image(registry, size, seed=random.randrange(1 << 30))
        swarm = NamespaceSwarm(registry, directory, hosts.addresses)
        (directory / "members").write_text("".join(f"{id_}@{at}\n" for id_, at in hosts.addresses.items()))
        (directory / "config.json").write_text("{}")
        stack.callback(stop, swarm)
        for id_ in hosts.names:
            swarm.start(id_, "--topology", topology, "--arity", str(arity), "--key", str(key_file(directory)))
        wait_until_alive(hosts)
        offsets = list(range(0, size, EXTENT))
        random.Random(1).shuffle(offsets)
        start_at = time.monotonic() + 3 + 0.4 * count
        headers = {"X-Obdlab-Tree": str(image.tree.reference)}
        readers = []
        for id_, address in hosts.addresses.items():
            what = json.dumps([address, swarm.url(image.digest), headers, offsets, EXTENT, size, start_at])
            command = [*in_namespace(id_), sys.executable, "-c", READER, what]
            readers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "up\n"
        assert time.monotonic() < start_at, "the machine is too slow to start all readers in time"
        time.sleep(start_at - time.monotonic())
        before = busy_s()
        seconds = [float(reader.communicate(timeout=WAIT_S)[0]) for reader in readers]
        after = busy_s()
        numbers = {id_: metrics(id_, address) for id_, address in hosts.addresses.items()}
    received = {source: sum(each.get(f'received_bytes_total{{source="{source}"}}', 0) for each in numbers.values())
                for source in ("origin", "peer")}  # fmt: skip
    return {
        "hosts": count,
        "topology": topology,
        "arity": arity,
        "first_s": round(min(seconds), 3),
        "median_s": round(statistics.median(seconds), 3),
        "last_s": round(max(seconds), 3),
        "origin_working_sets": round(received["origin"] / size, 3),
        "peer_working_sets": round(received["peer"] / size, 3),
        "most_copies": round(max(each.get('sent_bytes_total{to="peer"}', 0) for each in numbers.values()) / size, 2),
        "failovers": sum(each.get("failovers_total", 0) for each in numbers.values()),
        "busy": round((after[0] - before[0]) / (after[1] - before[1]), 2),
        "host_mbit": host_mbit,
        "origin_mbit": origin_mbit,
        "working_set": size,
    }


@contextmanager
def serving() -> Iterator[Registry]:
    """Run the registry at the bench's address."""
    registry = Registry()
    server = faulty.Server(("10.77.0.1", 0), faulty.Handler)
    server.registry = registry
    registry.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield registry
    finally:
        registry.closing.set()
        server.shutdown()
        server.hang_up()
        thread.join()
        server.server_close()


def stop(swarm: Swarm) -> None:
    for process in swarm.processes.values():
        process.terminate()
    for process in swarm.processes.values():
        process.wait(WAIT_S)


METRICS = """
import sys, urllib.request
try:
    print(urllib.request.urlopen(f"http://{sys.argv[1]}/metrics", timeout=5).read().decode())
except OSError:
    pass
"""


def metrics(name: str, address: str) -> dict[str, float]:
    """Return an agent's metrics, which it shows to its own host alone; empty if it does not answer."""
    text = run([*in_namespace(name), sys.executable, "-c", METRICS, address])
    lines = [line.removeprefix("obdlab_peer_").rpartition(" ") for line in text.splitlines() if line[:1] == "o"]
    return {key: float(value) for key, _, value in lines}


def wait_until_alive(hosts: Hosts) -> None:
    end = time.monotonic() + WAIT_S
    for name, address in hosts.addresses.items():
        while not metrics(name, address):
            assert time.monotonic() < end, f"{name} does not start"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--topologies", nargs="+", default=["none", "rendezvous"])
    parser.add_argument("--arity", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--working-set", type=int, default=4 << 20, help="bytes")
    parser.add_argument("--host-mbit", type=float, default=16.0)
    parser.add_argument("--origin-mbit", type=float, default=32.0)
    args = parser.parse_args(arguments)
    cells = [(count, topology) for count in args.hosts for topology in args.topologies] * args.repeats
    random.shuffle(cells)
    for count, topology in cells:
        with tempfile.TemporaryDirectory(prefix="obdlab-peers-") as directory:
            row = measure(
                *(count, topology, args.arity, args.working_set, args.host_mbit, args.origin_mbit), Path(directory)
            )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
