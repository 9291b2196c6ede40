"""The reads of a recorded start, made again on each of several hosts, through their agents.

Reads of one step go out at the same time, as a device's do; the next step begins a program's time later. Bytes are
compared with those that were pushed.
"""

from __future__ import annotations

import http.client
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from obdlab.formats.hashtree import HashTree, TreeMaker
from obdlab.formats.oci import digest_of
from obdlab.lab.testbed.process import LabError
from obdlab.registry.p2p import TREE_HEADER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obdlab.lab.testbed.hostnet import HostNetwork
    from obdlab.peers.simulator import Workload

_READ_S = 120.0


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob of random bytes, which no one can compress, and its hash tree."""

    data: bytes
    tree: HashTree

    @property
    def digest(self) -> str:
        """The blob's digest."""
        return digest_of(self.data)

    @classmethod
    def of(cls, size: int, seed: str) -> Layer:
        """Return a blob of ``size`` bytes; the same for the same seed."""
        data, maker = Random(seed).randbytes(size), TreeMaker()
        maker.update(data)
        return cls(data, maker.finish(digest_of(data)))


@dataclass(frozen=True, slots=True)
class Block:
    """The range of a layer that a block of the workload stands for."""

    layer: int
    begin: int
    end: int


class Start:
    """A recorded start as ranges of blobs: each layer's blocks lie one after the other."""

    def __init__(self, workload: Workload, seed: str) -> None:
        self.workload = workload
        sizes = [0] * (1 + max(workload.layers))
        self.blocks: list[Block] = []
        for layer, size in zip(workload.layers, workload.sizes, strict=True):
            self.blocks.append(Block(layer, sizes[layer], sizes[layer] + size))
            sizes[layer] += size
        self.layers = [Layer.of(size, f"{seed} {number}") for number, size in enumerate(sizes)]


class Replayer:
    """Reads a start on one host. ``path_of`` returns the agent's path of a layer's blob, by its digest."""

    def __init__(self, start: Start, address: str, path_of: Callable[[str], str]) -> None:
        self._start, self._address, self._path_of = start, address, path_of
        self._connections: list[http.client.HTTPConnection] = []

    def run(self, local_s: float, slower: float) -> float:
        """Read everything, and return the seconds it took; the calling thread's sockets are the host's.

        ``local_s`` passes before the first read. It and the recorded pauses last ``slower`` times as long.
        Raises LabError for wrong bytes and failed reads.
        """
        with ExitStack() as stack:
            began_s = time.monotonic()
            time.sleep(local_s * slower)
            for step in self._start.workload.steps:
                time.sleep(step.think_s * slower)
                self._read([self._start.blocks[block] for block in step.blocks], stack)
            return time.monotonic() - began_s

    def _read(self, blocks: Sequence[Block], stack: ExitStack) -> None:
        host, _, port = self._address.rpartition(":")
        while len(self._connections) < len(blocks):
            connection = http.client.HTTPConnection(host, int(port), timeout=_READ_S)
            self._connections.append(stack.enter_context(closing(connection)))
        try:
            for connection, block in zip(self._connections, blocks, strict=False):
                layer = self._start.layers[block.layer]
                headers = {
                    "Range": f"bytes={block.begin}-{block.end - 1}",
                    TREE_HEADER: str(layer.tree.reference),
                }
                connection.request("GET", self._path_of(layer.digest), headers=headers)
            for connection, block in zip(self._connections, blocks, strict=False):
                answer = connection.getresponse()
                data = answer.read()
                if data != self._start.layers[block.layer].data[block.begin : block.end]:
                    raise LabError(
                        f"agent {self._address}: wrong bytes (status {answer.status}, {len(data)} bytes, wanted "
                        f"{block.end - block.begin})"
                    )
        except (OSError, http.client.HTTPException) as error:
            raise LabError(f"agent {self._address}: a read failed: {error!r}") from error


def run_together(
    network: HostNetwork, replayers: dict[str, Replayer], local_s: float, slower: float, timeout_s: float
) -> dict[str, float]:
    """Start on all hosts at one moment; return the seconds of each. Raises LabError."""
    took: dict[str, float] = {}
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(replayers) + 1)

    def start_on(name: str) -> None:
        try:
            with network.on(name):
                barrier.wait(timeout_s)
                took[name] = replayers[name].run(local_s, slower)
        except BaseException as error:  # a thread's error is the caller's
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=start_on, args=(name,), daemon=True) for name in replayers]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    try:
        barrier.wait(timeout_s)
    except threading.BrokenBarrierError:
        pass  # the failure says why
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    wrong = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
    if wrong:
        raise LabError(f"start on {len(replayers)} hosts: {wrong[0]}") from wrong[0]
    if len(took) < len(replayers):
        missing = ", ".join(sorted(set(replayers) - set(took)))
        raise LabError(f"start on {len(replayers)} hosts: not ready after {timeout_s:g} s: {missing}")
    return took
