"""Agents as real processes on loopback, and readers of blobs through them."""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from obdlab.formats.hashtree import HashTree, TreeMaker
from obdlab.formats.oci import digest_of
from obdlab.peers.topology.rendezvous import chunk_key, rank, tree
from obdlab.registry.p2p import TREE_HEADER
from tests.registry.faulty import FaultyRegistry

#: Nothing here takes this long, unless something hangs.
WAIT_S = 60.0
_KEY = b"a key that all of these agents share"
PREFIX = "peer"


@dataclass
class Image:
    """A blob of a registry, with its hash tree."""

    data: bytes
    tree: HashTree

    @property
    def digest(self) -> str:
        return digest_of(self.data)


def make_image(registry: FaultyRegistry, size: int, seed: int = 1) -> Image:
    data = random.Random(seed).randbytes(size)
    maker = TreeMaker()
    maker.update(data)
    image = Image(data, maker.finish(digest_of(data)))
    registry.add_blob(data)
    registry.add_blob(image.tree.file)
    return image


@dataclass
class Read:
    """What a reader got, when each part of it came, and how it ended."""

    status: int = 0
    data: bytes = b""
    longest_pause_s: float = 0.0
    seconds: float = 0.0
    error: str = ""


@dataclass
class Swarm:
    """Agents by id: their addresses and processes. Stop and kill the latter as a test likes."""

    registry: FaultyRegistry
    directory: Path
    addresses: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, id_: str, *options: str) -> None:
        log = (self.directory / f"{id_}.log").open("ab")
        with log:
            self.processes[id_] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "obdlab", "serve", "peer", "--listen", self.addresses[id_], "--id", id_),
                    *("--registry", self.registry.host, "--members", f"file:{self.directory / 'members'}"),
                    *("--cache-dir", str(self.directory / id_), "--log-level", "debug", *options),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "DOCKER_CONFIG": str(self.directory / "docker")},
            )

    def wait_until_ready(self) -> None:
        end = time.monotonic() + WAIT_S
        for id_, process in self.processes.items():
            while not self.is_alive(id_):
                assert process.poll() is None, self.log(id_)
                assert time.monotonic() < end, self.log(id_)
                time.sleep(0.05)

    def is_alive(self, id_: str) -> bool:
        try:
            return self.get(id_, "/alive").status == 204
        except OSError:
            return False

    def log(self, id_: str) -> str:
        return (self.directory / f"{id_}.log").read_text(errors="replace")

    def signal(self, id_: str, number: int) -> None:
        self.processes[id_].send_signal(number)

    def kill(self, id_: str) -> None:
        self.signal(id_, signal.SIGKILL)
        self.processes[id_].wait(WAIT_S)

    def get(self, id_: str, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> Read:
        """Send a request to an agent and read the answer as it comes."""
        host, _, port = self.addresses[id_].rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
        found, began = Read(), time.monotonic()
        try:
            connection.request(method, path, headers=headers or {})
            last = began
            answer = connection.getresponse()
            found.status = answer.status
            pieces = []
            try:
                while piece := answer.read1(1 << 16):
                    now = time.monotonic()
                    found.longest_pause_s = max(found.longest_pause_s, now - last)
                    last = now
                    pieces.append(piece)
                if answer.length:
                    found.error = f"{answer.length} bytes are missing"
            except (OSError, http.client.HTTPException) as error:
                found.error = str(error) or type(error).__name__
            found.data = b"".join(pieces)
        finally:
            connection.close()
        found.seconds = time.monotonic() - began
        return found

    def url(self, digest: str, prefix: str = PREFIX) -> str:
        return f"/{prefix}/{self.registry.repository().blobs_url}/{digest}"

    def read(self, id_: str, image: Image, begin: int, end: int, headers: dict[str, str] | None = None) -> Read:
        wanted = {"Range": f"bytes={begin}-{end - 1}", TREE_HEADER: str(image.tree.reference), **(headers or {})}
        return self.get(id_, self.url(image.digest), {k: v for k, v in wanted.items() if v})

    def metric(self, id_: str, name: str) -> float:
        """Return the sum of a metric's samples, given the beginning of their lines."""
        text = self.get(id_, "/metrics").data.decode()
        return sum(
            float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"obdlab_peer_{name}")
        )

    def parents(self, image: Image) -> dict[str, str | None]:
        """Return the tree of the blob's first chunk, the root first."""
        return tree(rank(chunk_key(image.digest, 0), dict.fromkeys(self.addresses, 1.0)))


def free_address(host: str = "127.0.0.1") -> str:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def key_file(directory: Path, key: bytes = _KEY) -> Path:
    path = directory / "key"
    if not path.exists():
        path.touch(0o600)
        path.write_bytes(key)
    return path


@contextmanager
def running_swarm(
    registry: FaultyRegistry,
    directory: Path,
    count: int,
    *options: str,
    strangers: dict[str, str] | None = None,
    keyed: bool = True,
) -> Iterator[Swarm]:
    """Run agents "a0", "a1", ...; ``strangers`` are members that the test runs itself."""
    addresses = {f"a{number}": free_address() for number in range(count)}
    members = {**addresses, **(strangers or {})}
    (directory / "members").write_text("".join(f"{id_}@{address}\n" for id_, address in members.items()))
    (directory / "docker").mkdir(exist_ok=True)
    swarm = Swarm(registry, directory, members)
    keys = ["--key", str(key_file(directory))] if keyed else []
    try:
        for id_ in addresses:
            swarm.start(id_, *keys, *options)
        swarm.wait_until_ready()
        yield swarm
    finally:
        for process in swarm.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in swarm.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def all_at_once(swarm: Swarm, ids: list[str], image: Image, begin: int, end: int) -> dict[str, Read]:
    """Read the same range at several agents at the same time."""
    found: dict[str, Read] = {}
    barrier = threading.Barrier(len(ids))

    def read(id_: str) -> None:
        barrier.wait(WAIT_S)
        found[id_] = swarm.read(id_, image, begin, end)

    threads = [threading.Thread(target=read, args=(id_,)) for id_ in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == len(ids), "readers hang"
    return found
