"""Which cache extent starts an image fastest: the reads of one real start, replayed over shaped links. Needs root.

    python -m tests.benchmarks.extents [--image pydata] [--rates 100 1000] [--units 64 128 256] [--ahead 0 1024]

First the image's program is started once from a device whose reads take 5 ms each, so that the record shows which
of them wait for each other. Then they are replayed against a cold cache over each link: a read begins when those are
over that were over when it began. "Extents" are the distinct 256 KiB pieces of the layers that the device's reads
touched; requests and bytes are all that was fetched, opening the image included, as shares of them. The image must
have been converted into the lab's registry (obdlab lab run).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from obdlab.blob import Blob, Joint, Wrapper
from obdlab.call import Call
from obdlab.devices.fuse_loop import FuseLoopDevice
from obdlab.image.config import ImageConfig
from obdlab.image.from_manifest import fetch_config
from obdlab.image.open import open_image
from obdlab.lab.images.recipe import find_recipe
from obdlab.lab.paths import LabPaths
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.registry import RegistryHost
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.system.mount import mount, unmount

LAB = Path("/var/lib/obdlab/lab/testbed/registry/data")
EXTENT = 256 << 10
READ_S = 0.005
MiB = 1 << 20


@dataclass(frozen=True)
class Read:
    begin_s: float
    end_s: float
    offset: int
    length: int


class Recorder(Wrapper):
    """A disk that notes when which of its bytes were read, each read taking a while."""

    def __init__(self, disk: Blob) -> None:
        super().__init__(disk)
        self.reads: list[Read] = []

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        begin = time.monotonic()
        data = super().read_at(offset, length, call)
        time.sleep(READ_S)
        self.reads.append(Read(begin, time.monotonic(), offset, length))
        return data


@contextmanager
def registry(rate_mbit: float, rtt_ms: float, data: Path | None = None) -> Iterator[RegistryHost]:
    """Serve what the lab's registry holds over a shaped link; the files are shared, not copied."""
    data = data or LAB
    with (
        tempfile.TemporaryDirectory(prefix="extents-", dir=data.parents[1]) as work,
        ExperimentNetwork(rate_mbit, rtt_ms, Path(work) / "state") as network,
    ):
        subprocess.run(["cp", "-al", data, Path(work) / "data"], check=True)
        with RegistryHost(Path(work), network) as host:
            host.preload()
            yield host


def image_config(host: RegistryHost, image: str, tag: str) -> ImageConfig:
    with closing(RegistryClient()) as client:
        reference = Reference.parse(host.reference(image, tag))
        return fetch_config(client, reference, host_platform())


def record(config: ImageConfig, command: Sequence[str], directory: Path) -> list[Read]:
    """Start the image's program once, until it says that it is ready, and return what was read of its disk."""
    settings = Settings(cache_dir=directory / "cache")
    mountpoint, upper = directory / "root", directory / "upper"
    for path in (mountpoint, upper, directory / "device"):
        path.mkdir()
    with ExitStack() as stack:
        image = stack.enter_context(open_image(config, settings))
        recorder = Recorder(image)
        device = FuseLoopDevice(recorder, directory / "device", read_only=True)
        stack.callback(device.stop)
        mount(device.path, mountpoint, read_only=True)
        stack.callback(unmount, mountpoint)
        script = (
            f"mount -t tmpfs none {upper} && mkdir {upper}/u {upper}/w {upper}/r &&"
            f"mount -t overlay -o lowerdir={mountpoint},upperdir={upper}/u,workdir={upper}/w none {upper}/r &&"
            f"mount -t proc none {upper}/r/proc && mount --rbind /dev {upper}/r/dev && ip link set lo up;"
            f'exec chroot {upper}/r "$@"'
        )
        program = subprocess.Popen(
            ["unshare", "-mnpf", "--kill-child", "sh", "-c", script, "sh", *command],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert program.stdout is not None
        try:
            for line in program.stdout:
                if line.strip() == "READY":
                    break
            else:
                raise SystemExit("the program ended before it was ready")
            reads = list(recorder.reads)
        finally:
            program.kill()
            program.wait()
            program.stdout.close()
    return sorted(reads, key=lambda read: read.begin_s)


def replay(disk: Blob, reads: Sequence[Read], threads: ThreadPoolExecutor) -> None:
    """Read the same, each read after those that it came after."""
    running: list[tuple[float, Future[bytes]]] = []
    for read in reads:
        before = [done for done in running if done[0] <= read.begin_s]
        for _, future in before:
            future.result()
        running = [done for done in running if done[0] > read.begin_s]
        running.append((read.end_s, threads.submit(disk.read_at, read.offset, read.length)))
    for _, future in running:
        future.result()


class Touched:
    """Collects which extents of which blobs are read from the cache."""

    def __init__(self) -> None:
        self.extents: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def around(self, joint: Joint, blob: Blob) -> Blob:
        """Watch the cached blobs: for ``open_image``."""
        return _Touching(blob, self) if joint == "cache" else blob

    def note(self, blob: Blob, offset: int, length: int) -> None:
        with self._lock:
            for number in range(offset // EXTENT, (offset + length - 1) // EXTENT + 1):
                self.extents[blob.name, number] = min(EXTENT, blob.size - number * EXTENT)


class _Touching(Wrapper):
    def __init__(self, below: Blob, touched: Touched) -> None:
        super().__init__(below)
        self._touched = touched

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        self._touched.note(self, offset, length)
        return super().read_at(offset, length, call)


@dataclass(frozen=True)
class Outcome:
    total_s: float
    requests: int
    fetched: int


def start_once(config: ImageConfig, reads: Sequence[Read], settings: Settings) -> Outcome:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, ThreadPoolExecutor(64) as threads:
        began = time.monotonic()
        with open_image(config, replace(settings, cache_dir=Path(directory))) as image:
            replay(image, reads, threads)
            total_s = time.monotonic() - began
            quiet = image.statistics()
            while True:  # what is fetched ahead counts, too
                time.sleep(0.3)
                counted = image.statistics()
                if counted["requests"] == quiet["requests"]:
                    break
                quiet = counted
        return Outcome(total_s, counted["requests"], counted["demand_bytes"] + counted["readahead_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="pydata")
    parser.add_argument("--tag", default="", help="default: the converted tag whose name sorts last")
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 1000], metavar="MBIT")
    parser.add_argument("--rtt", type=float, default=5.0, metavar="MS")
    parser.add_argument("--units", type=int, nargs="+", default=[64, 128, 256], metavar="KIB", help="extents")
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1024], metavar="KIB")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if os.geteuid():
        raise SystemExit("needs root: mounts, a device, network namespaces")
    tags = LAB / "docker/registry/v2/repositories" / args.image / "_manifests/tags"
    tag = args.tag or max(path.name for path in tags.iterdir() if "-obd" in path.name)
    touched = Touched()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, registry(0, 0) as host:
        config = image_config(host, args.image, tag)
        reads = record(config, find_recipe(args.image, LabPaths().datasets).config.command, Path(directory))
        with open_image(config, Settings(cache_dir=Path(directory) / "again"), around=touched.around) as image:
            for read in reads:
                image.read_at(read.offset, read.length)
    extents, size = len(touched.extents), sum(touched.extents.values())
    length = sum(read.length for read in reads)
    print(
        f"{args.image}:{tag}: {len(reads)} reads of {length / MiB:.1f} MiB, {extents} extents of {size / MiB:.1f} MiB"
    )
    for rate in args.rates:
        with registry(rate, args.rtt) as host:
            config = image_config(host, args.image, tag)
            choices = [(unit, ahead) for unit in args.units for ahead in args.ahead]
            outcomes: dict[tuple[int, int], list[Outcome]] = {choice: [] for choice in choices}
            for _ in range(args.rounds):
                for unit, ahead in choices:
                    settings = Settings(cache_extent=unit << 10, cache_extent_max=0, readahead_max=ahead << 10)
                    outcomes[unit, ahead].append(start_once(config, reads, settings))
            for (unit, ahead), found in outcomes.items():
                middle = statistics.median(outcome.total_s for outcome in found)
                requests = statistics.median(outcome.requests for outcome in found)
                fetched = statistics.median(outcome.fetched for outcome in found)
                print(
                    f"{rate:5g} Mbit/s {args.rtt:g} ms  extent {unit:4} KiB  ahead {ahead:4} KiB  {middle:6.2f} s  "
                    f"{requests:5.0f} requests ({requests / extents:.2f})  "
                    f"{fetched / MiB:6.1f} MiB ({fetched / size:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
