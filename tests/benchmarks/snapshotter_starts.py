"""What a container's start costs in the snapshotter: warm, cold, and thirty at once, beside overlayfs.

    python -m tests.benchmarks.snapshotter_starts [rounds] [starts]

One containerd serves both snapshotters. The image has 20 layers, converted for obdlab from the very image that
overlayfs runs. ``prepare + mounts`` is called on the snapshotters through containerd, in turns: of an image that is
attached, and (obdlab alone) of one whose device and cache are gone; its registry is on this machine. ``starts`` are
those of whole containers (``ctr run``), all begun together. The last lines are the service's memory.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING

from obdlab.cli.main import main as obdlab
from obdlab.containerd.client import Containerd
from obdlab.system import mount
from tests.benchmarks.snapshotter_rpc import _pss_mib
from tests.containerd_host import NAME, ObdlabHost, containerd_with_obdlab
from tests.registry.server import running_registry
from tests.snapshotter import imagefiles
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Callable

DEPTH = 20


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    starts = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    with tempfile.TemporaryDirectory(prefix="o") as text:
        directory = Path(text)
        with running_registry(directory / "registry") as server, containerd_with_obdlab(directory / "host") as host:
            plain = imagefiles.push(server.host, "bench/plain", *imagefiles.image_documents(_layers()))
            converted = f"{server.host}/bench/converted:latest"
            work = ["--work-dir", text, "--database", "none"]
            if obdlab(["image", "convert", *work, plain, converted]) != 0:
                raise SystemExit("the conversion failed")
            host.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", plain)
            host.rpull(converted)
            tops = {NAME: _top(host, NAME), "overlayfs": _top(host, "overlayfs")}
            _warm(host, tops, rounds)
            _cold(host, tops[NAME], directory / "host/snapshotter/cache", max(5, rounds // 10))
            both = ((NAME, converted), ("overlayfs", plain))
            for turn, (name, image) in enumerate(both + both[::-1]):  # so that neither gets all of a busy spell
                _starts(host, name, image, starts, turn)
            print(f"memory of the service: {_pss_mib(host.snapshotter.pid):.1f} MiB PSS")


def _layers() -> list[bytes]:
    layers = imagefiles.busybox_layers()
    for number in range(DEPTH - len(layers)):
        layer = imagefiles.LayerTar()
        layer.add(f"data/more{number}", b"x" * 5000)
        layers.append(layer.bytes())
    return layers


def _top(host: ObdlabHost, snapshotter: str) -> str:
    lines = host.ctr("snapshots", "--snapshotter", snapshotter, "ls").splitlines()[1:]
    rows = [line.split() for line in lines]
    parents = {row[1] for row in rows if len(row) > 2}
    (top,) = {row[0] for row in rows} - parents
    return top


def _warm(host: ObdlabHost, tops: dict[str, str], rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in tops}
    with Containerd(host.containerd.address, "test") as client, client.lease(expire_s=3600) as lease:
        metadata = (("containerd-namespace", "test"), ("containerd-lease", lease.lease_id))
        clients = {name: WireSnapshotter(host.containerd.address, name, *metadata) for name in tops}
        for number in range(rounds + 1):
            for name, wire in clients.items():
                took = _prepare(wire, f"warm{number}", tops[name])
                wire.remove(f"warm{number}")
                if number:  # the first one attaches
                    times[name].append(took)
        for wire in clients.values():
            wire.close()
    ours, theirs = (median(times[name]) * 1000 for name in (NAME, "overlayfs"))
    print(f"prepare + mounts, attached: obdlab {ours:.2f} ms, overlayfs {theirs:.2f} ms, ratio {ours / theirs:.2f}")


def _prepare(wire: WireSnapshotter, key: str, parent: str) -> float:
    began = time.perf_counter()
    wire.prepare(key, parent, {})
    wire.mounts(key)
    return time.perf_counter() - began


def _cold(host: ObdlabHost, top: str, cache: Path, rounds: int) -> None:
    wire = WireSnapshotter(str(host.snapshotter.address))
    names = {snapshot.key: snapshot for snapshot in wire.walk()}
    (own,) = [key for key in names if key.endswith(top)]
    times = []
    for number in range(rounds):
        for entry in mount.mounts():
            if host.snapshotter.root in entry.mountpoint.parents:
                mount.unmount(entry.mountpoint)
        for device in host.snapshotter.devices.list():
            host.snapshotter.devices.detach(device.device_id, force=True)  # copied mounts do not count
        shutil.rmtree(cache, ignore_errors=True)
        times.append(_prepare(wire, f"cold{number}", own))
        wire.remove(f"cold{number}")
    wire.close()
    figures = f"median {median(times) * 1000:.0f} ms, slowest {max(times) * 1000:.0f} ms"
    print(f"prepare + mounts, cold, {DEPTH} layers: {figures}")


def _starts(host: ObdlabHost, snapshotter: str, image: str, count: int, turn: int) -> None:
    def start(number: int) -> float:
        began = time.perf_counter()
        name = f"{snapshotter}-{turn}-{number}"
        host.ctr("run", "--rm", "--snapshotter", snapshotter, image, name, "/bin/sh", "-c", ":", timeout_s=300)
        return time.perf_counter() - began

    start(count)
    run: Callable[[int], float] = start
    with ThreadPoolExecutor(count) as pool:
        times = list(pool.map(run, range(count)))
    p50, p95 = median(times), quantiles(times, n=20)[-1]
    print(f"{count} starts at once, {snapshotter}: p50 {p50:.2f} s, p95 {p95:.2f} s, p95/p50 {p95 / p50:.2f}")


if __name__ == "__main__":
    main()
