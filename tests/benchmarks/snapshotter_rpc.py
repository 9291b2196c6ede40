"""Latency of the snapshotter's calls, through one containerd, against its built-in overlayfs snapshotter.

    python -m tests.benchmarks.snapshotter_rpc [rounds]

Both are called in turns; figures are medians in ms, and the ratio. The last line is the memory of the service.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from obdlab.containerd.client import Containerd
from tests.containerd_host import NAME, containerd_with_obdlab
from tests.snapshotter.wire import WireSnapshotter

DEPTH = 20


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="o") as text, containerd_with_obdlab(Path(text)) as host:
        with Containerd(host.containerd.address, "bench") as client, client.lease(expire_s=3600) as lease:
            names = (("containerd-namespace", "bench"), ("containerd-lease", lease.lease_id))
            snapshotters = {
                name: WireSnapshotter(host.containerd.address, name, *names) for name in (NAME, "overlayfs")
            }
            for snapshotter in snapshotters.values():
                _chain(snapshotter)
            for number in range(rounds):
                for name, snapshotter in snapshotters.items():
                    _round(snapshotter, number, name, times)
            for snapshotter in snapshotters.values():
                snapshotter.close()
        for call in ("prepare", "mounts", "stat", "commit", "remove", "list"):
            ours, theirs = (median(times[name, call]) * 1000 for name in (NAME, "overlayfs"))
            print(f"{call:8} obdlab {ours:7.3f} ms   overlayfs {theirs:7.3f} ms   ratio {ours / theirs:5.2f}")
        print(f"memory of the service: {_pss_mib(host.snapshotter.pid):.1f} MiB PSS")


def _chain(snapshotter: WireSnapshotter) -> None:
    parent = ""
    for number in range(DEPTH):
        snapshotter.prepare(f"key{number}", parent, {})
        parent = f"layer{number}"
        snapshotter.commit(parent, f"key{number}", {})


def _round(snapshotter: WireSnapshotter, number: int, name: str, times: dict[tuple[str, str], list[float]]) -> None:
    key = f"container{number}"
    for call, arguments in (
        ("prepare", (key, f"layer{DEPTH - 1}", {})),
        ("mounts", (key,)),
        ("stat", (key,)),
        ("commit", (f"{key}-done", key, {})),
        ("remove", (f"{key}-done",)),
        ("list", ()),
    ):
        began = time.perf_counter()
        getattr(snapshotter, "walk" if call == "list" else call)(*arguments)
        times.setdefault((name, call), []).append(time.perf_counter() - began)


def _pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    main()
