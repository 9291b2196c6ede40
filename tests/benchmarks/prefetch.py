"""A start with and without its trace: the reads of one real start, replayed over shaped links. Needs root.

    python -m tests.benchmarks.prefetch [--image redis] [--rates 100 1000] [--rtts 0 20] [--rounds 3] [--unit KiB]

As in :mod:`tests.benchmarks.extents`, the image's program is started once and its reads are replayed in their order
against a cold cache, from before the image is opened until the last of them is there; the program itself takes no
time. At the first start the trace is recorded. "ideal" is what the units that were used take at the link's rate, and
two round trips. Over-read is what was prefetched and not used, as a share of what was. "other" is the trace with its
layers' offsets turned around, that of another program; "hot" is the image with a hot layer of the trace, by its
compression and block size. The image must have been converted into the lab's registry.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.publish.hot_and_traces import add_hot_layer
from obdlab.formats.trace import Trace
from obdlab.image.config import ImageConfig
from obdlab.image.open import open_image
from obdlab.lab.images.recipe import find_recipe
from obdlab.lab.paths import LabPaths
from obdlab.layerfiles.writing import Packing
from obdlab.registry.client import RegistryClient
from obdlab.settings.settings import Settings
from tests.benchmarks.extents import LAB, Read, image_config, record, registry, replay
from tests.registry.server import running_registry

MiB = 1 << 20
HOT = [Packing("lz4", 4096, tar=True), Packing("zstd", 4096, tar=True), Packing("zstd", 32768, tar=True)]


@dataclass(frozen=True)
class Outcome:
    total_s: float
    counted: dict[str, int]

    @property
    def fetched(self) -> int:
        return sum(self.counted[f"{cause}_bytes"] for cause in ("demand", "readahead", "prefetch"))


def start_once(config: ImageConfig, reads: Sequence[Read], settings: Settings) -> Outcome:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, ThreadPoolExecutor(64) as threads:
        began = time.monotonic()
        with open_image(config, replace(settings, cache_dir=Path(directory))) as image:
            replay(image, reads, threads)
            total_s = time.monotonic() - began
            counted = image.statistics()
            while True:  # what is fetched ahead counts, too
                time.sleep(0.3)
                now = image.statistics()
                if now["requests"] == counted["requests"]:
                    return Outcome(total_s, now)
                counted = now


def reversed_trace(trace: Trace) -> Trace:
    """The same amount of other bytes: each layer's reads from its other end."""
    ends = {
        layer: max(at + size for each, at, size in trace.reads() if each == layer) for layer, _, _ in trace.reads()
    }
    return Trace.from_reads((layer, ends[layer] - at - size, size) for layer, at, size in trace.reads())


def add_hot_layers(directory: Path, image: str, tag: str, trace: bytes) -> dict[str, str]:
    """Store the image with hot layers of several packings beside it; return their tags by name."""
    tags = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as cache, running_registry(directory) as server:
        client = RegistryClient()
        for packing in HOT:
            name = f"hot {packing.algorithm} {packing.block_size >> 10}"
            tags[name] = f"{tag}-{name.replace(' ', '-')}"
            source = open_source(f"{server.host}/{image}:{tag}", client)
            target = open_destination(f"{server.host}/{image}:{tags[name]}", client)
            settings = Settings(cache_dir=Path(cache))
            _, size = add_hot_layer(source, target, trace, settings, client=client, packing=packing)
            print(f"{name}: {size / MiB:.2f} MiB")
        client.close()
    return tags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default="redis")
    parser.add_argument("--tag", default="", help="default: the converted tag whose name sorts last")
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 1000], metavar="MBIT")
    parser.add_argument("--rtts", type=float, nargs="+", default=[0, 20], metavar="MS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unit", type=int, default=Settings().cache_unit >> 10, help="of the cache, in KiB")
    args = parser.parse_args()
    if os.geteuid():
        raise SystemExit("needs root: mounts, a device, network namespaces")
    tags = LAB / "docker/registry/v2/repositories" / args.image / "_manifests/tags"
    tag = args.tag or max(path.name for path in tags.iterdir() if "-obd" in path.name)
    with tempfile.TemporaryDirectory(dir=LAB.parents[2]) as directory:
        path, other = Path(directory) / "trace", Path(directory) / "other"
        path.touch()
        with registry(0, 0) as host:
            config = replace(image_config(host, args.image, tag), record_trace_path=str(path))
            reads = record(config, find_recipe(args.image, LabPaths().datasets).config.command, Path(directory))
        trace = Trace.from_bytes(path.read_bytes())
        other.write_bytes(reversed_trace(trace).to_bytes())
        print(
            f"{args.image}:{tag}: {len(reads)} reads of the disk, {len(trace)} of layers, {trace.size / MiB:.1f} MiB"
        )
        data = Path(directory) / "registry" / "storage"
        data.parent.mkdir()
        subprocess.run(["cp", "-al", LAB, data], check=True)
        hot_tags = add_hot_layers(data.parent, args.image, tag, path.read_bytes())
        choices = {"without": None, "with": path, "other": other, **dict.fromkeys(hot_tags)}
        for rate in args.rates:
            for rtt in args.rtts:
                with registry(rate, rtt, data) as host:
                    configs = {name: image_config(host, args.image, hot_tags.get(name, tag)) for name in choices}
                    outcomes: dict[str, list[Outcome]] = {name: [] for name in choices}
                    for _ in range(args.rounds):
                        for name, chosen in choices.items():
                            settings = Settings(trace_path=chosen, cache_unit=args.unit << 10)
                            outcomes[name].append(start_once(configs[name], reads, settings))
                report(rate, rtt, outcomes)


def report(rate: float, rtt: float, outcomes: dict[str, list[Outcome]]) -> None:
    without = statistics.median(outcome.total_s for outcome in outcomes["without"])
    for name, found in outcomes.items():
        middle = sorted(found, key=lambda outcome: outcome.total_s)[len(found) // 2]
        counted = middle.counted
        used = counted["prefetch_used_bytes"]
        ideal = (used + counted["demand_bytes"]) * 8e-6 / rate + 2e-3 * rtt
        over = counted["prefetch_bytes"] / used - 1 if used else 0.0
        print(
            f"{rate:5g} Mbit/s {rtt:2g} ms  {name:11} {middle.total_s:6.2f} s "
            f"({middle.total_s / without:.2f} of without, {middle.total_s / ideal:.2f} of ideal)  "
            f"{counted['requests']:4} requests  {middle.fetched / MiB:6.2f} MiB  "
            f"prefetched {counted['prefetch_bytes'] / MiB:.2f} MiB, over-read {over:.1%}, misses {counted['misses']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
