"""What lies between the request for a container and the first byte of its image. Needs root.

    python -m tests.benchmarks.first_byte LAYOUT... [--rate 1000] [--rtt 0] [--rounds 9] [--against CHECKOUT]

Each LAYOUT is a converted image (obdlab image convert IMAGE oci:LAYOUT). It is pushed to a registry behind a shaped
link. A round begins with an empty cache and a running device host. It makes the layers' snapshots as a pull does,
waits for what the pull fetches in the background (``--at-once``: does not), prepares a container's snapshot
("create") and lists the root directory of its image ("read"). Processor time is that of snapshotter, device host and
device servers in "create" and "read"; round trips are the longest chain of requests that waited for one another. With
``--against``, rounds alternate with those of another checkout's code; the last line is this one's ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from statistics import median

HERE = Path(__file__).parents[2]
FIGURES = ("pulled ms", "create ms", "read ms", "cpu ms", "rounds", "requests", "KB", "KB before")


def _round(reference: str, directory: Path, at_once: str) -> dict[str, float]:
    from obdlab.pull.resolve import resolve
    from obdlab.pull.unpack import snapshot_labels
    from obdlab.registry.client import RegistryClient
    from obdlab.registry.platform import host_platform
    from obdlab.registry.reference import Reference
    from obdlab.server.client import DeviceService
    from obdlab.settings.settings import Settings
    from obdlab.snapshotter.core import Snapshotter
    from obdlab.snapshotter.errors import AlreadyExistsError
    from obdlab.snapshotter.imagemounts import ImageDevices
    from obdlab.snapshotter.layout import Layout
    from obdlab.snapshotter.overlaybd import ImageOptions

    devices = DeviceService(directory / "run", Settings(cache_dir=directory / "cache"))
    layout = Layout(directory / "root")
    images = ImageDevices(layout, devices)
    snapshotter = Snapshotter(layout, images, ImageOptions())
    devices.start_host()
    with closing(RegistryClient()) as client:
        image = resolve(client, Reference.parse(reference), host_platform())
    time.sleep(1.0)  # the host imports a little more when it is idle
    pull_s, began, parent = time.time(), time.perf_counter(), ""
    for number, (layer, name) in enumerate(zip(image.layers, image.chain_ids, strict=True)):
        with suppress(AlreadyExistsError):
            snapshotter.prepare(f"extract-{number} {name}", parent, snapshot_labels(layer, name, reference))
        parent = name
    if not at_once:
        images._priming.wait(60.0)
    pulled = time.perf_counter()
    cpu_s, create_s, before = _cpu_s(), time.time(), time.perf_counter()
    (mounted, *_) = snapshotter.prepare("container", parent, {})
    created = time.perf_counter()
    (lower, *_) = [option for option in mounted.options if option.startswith("lowerdir=")] or [mounted.source]
    names = os.listdir(lower.removeprefix("lowerdir=").split(":")[0])
    read, ended_s = time.perf_counter(), time.time()
    assert names
    used_s = _cpu_s() - cpu_s
    snapshotter.remove("container")
    devices.shutdown(force=True)
    for name in (name for name in os.listdir(directory / "root/snapshots")):
        subprocess.run(["umount", "-l", directory / f"root/snapshots/{name}/block/mountpoint"], capture_output=True)
    devices.shutdown(force=True)
    snapshotter.close()
    times = (pulled - began, created - before, read - created, used_s)
    return {name: second * 1000 for name, second in zip(FIGURES, times, strict=False)} | {
        "pull_s": pull_s,
        "create_s": create_s,
        "ended_s": ended_s,
    }


# Of the group that the parent has put this process into.
def _cpu_s() -> float:
    lines = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for names, group in lines.items():
        if "cpuacct" in names.split(","):
            for root in (Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup/cpu,cpuacct")):
                with suppress(OSError):
                    return int((root / group.lstrip("/") / "cpuacct.usage").read_text()) / 1e9
    usage = Path("/sys/fs/cgroup") / lines[""].lstrip("/") / "cpu.stat"
    return int(dict(line.split() for line in usage.read_text().splitlines())["usage_usec"]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="+", metavar="LAYOUT", type=Path)
    parser.add_argument("--rate", type=float, default=1000.0, metavar="MBIT")
    parser.add_argument("--rtt", type=float, default=0.0, metavar="MS")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--at-once", action="store_true", help="the container comes right after the pull")
    parser.add_argument("--requests", action="store_true", help="print each of the last round")
    args = parser.parse_args()

    from obdlab.lab.testbed.cgroups import ControlGroups
    from obdlab.lab.testbed.netns import ExperimentNetwork
    from obdlab.lab.testbed.registry import RegistryHost
    from tests.benchmarks.cold_walk import rounds

    groups = ControlGroups("first-byte")
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as work,
        ExperimentNetwork(args.rate, args.rtt, Path(work) / "state") as network,
        RegistryHost(Path(work) / "registry", network) as host,
    ):
        groups.create()
        try:
            for layout in args.layouts:
                reference = host.push_layout(layout, f"first/{layout.name.lower()}")
                host.preload()
                sides = {"here": HERE} | ({"against": args.against.resolve()} if args.against else {})
                rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
                for _ in range(args.rounds):
                    for side, checkout in sides.items():
                        begin = host.mark()
                        with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as directory:
                            row = _child(groups, checkout, reference, Path(directory), args.at_once)
                        got = [
                            request
                            for request in host.requests(begin, host.mark())
                            if request.method == "GET" and request.blob
                        ]
                        created = [r for r in got if row["create_s"] <= r.began_s <= row["ended_s"]]
                        early = [r for r in got if row["pull_s"] <= r.began_s < row["create_s"]]
                        row |= {
                            "rounds": rounds(created, args.rtt / 1000),
                            "requests": len(created),
                            "KB": sum(request.written for request in created) / 1e3,
                            "KB before": sum(request.written for request in early) / 1e3,
                        }
                        rows[side].append(row)
                _report(layout.name, rows)
                if args.requests:
                    for each in sorted(got, key=lambda request: request.began_s):
                        at_ms = (each.began_s - row["create_s"]) * 1000
                        print(f"    {at_ms:8.1f} {each.duration_s * 1000:7.1f} ms  {each.blob[7:15]} {each.written}")
        finally:
            groups.remove()


def _child(groups, checkout: Path, reference: str, directory: Path, at_once: bool) -> dict[str, float]:
    words = [sys.executable, str(Path(__file__).resolve()), "--round", reference, str(directory)]
    done = subprocess.run(
        [*words, "at-once" if at_once else ""],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=lambda: groups.add(os.getpid()),
    )
    return json.loads(done.stdout)


def _report(name: str, rows: dict[str, list[dict[str, float]]]) -> None:
    middle = {
        side: {figure: median(row[figure] for row in found) for figure in FIGURES} for side, found in rows.items()
    }
    for side, figures in middle.items():
        print(f"  {name:20} {side:8}", *(f"{figure} {value:7.1f}" for figure, value in figures.items()), flush=True)
    if len(middle) == 2:
        ratios = {
            figure: median(a[figure] / b[figure] for a, b in zip(*rows.values(), strict=True) if b[figure])
            for figure in ("create ms", "read ms", "cpu ms")
        }
        print(f"  {name:20} ratio   ", *(f"{figure} {value:7.2f}" for figure, value in ratios.items()), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--round"]:
        print(json.dumps(_round(sys.argv[2], Path(sys.argv[3]), sys.argv[4])))
    else:
        main()
