"""A turboOCI image of one gzip layer as a device, beside ``gzip -dc`` of that layer: in order, and 4 KiB at random.

Run as root: python -m tests.benchmarks.turbo_device [--mib 256] [--rounds 5] [--gzip FILE]

The layer is a tar with one file of text, noise, runs and repetitions, packed by zlib at level 6; or ``--gzip FILE``,
of which the largest file is read. It lies on this host, in the page cache, as do index, metadata and sums. The device
is attached and mounted again in each round, so that nothing is decoded, and nothing is cached above it.

``in order``: the whole file by reads of 1 MiB, elapsed, beside ``gzip -dc`` of the layer on one processor; and once
more with the device's server on one processor. Rates are of content; 0.8 of gzip's is the aim. ``at random``: direct
reads of 4 KiB, no two in one span, beside the time in which zlib inflates a span of the same index, and beside the
share of a span in ``gzip -dc``'s time: 1 is the aim. Processor time is that of the device's server and of zlib, which
other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import mmap
import os
import random
import statistics
import subprocess
import tarfile
import tempfile
import time
import zlib
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.convert.endpoints.disks import config_of_files
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.convert.progress import Silent
from obdlab.formats.gzipindex import parse_window
from obdlab.formats.gzipmember import begin_inside_byte
from obdlab.layers.gziptarget import load_index
from obdlab.localfile import LocalFile
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests.convert.layouts import CONFIG, MANIFEST, Layout
from tests.layers.gzip_samples import content

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.image.config import ImageConfig
    from obdlab.server.client import AttachedDevice

MIB = 1 << 20
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
READS = 40


def make_layer(path: Path, mib: int) -> None:
    """Write the gzip layer."""
    part = content(8 * MIB)
    info = tarfile.TarInfo("data")
    info.size = mib * MIB
    packer = zlib.compressobj(6, wbits=31)
    with path.open("wb") as file:
        file.write(packer.compress(info.tobuf(tarfile.USTAR_FORMAT)))
        for _ in range(mib // 8):
            file.write(packer.compress(part))
        file.write(packer.compress(bytes(1024)) + packer.flush())


def make_image(layer: Path, directory: Path) -> ImageConfig:
    """Make a turboOCI image of the layer, and return the configuration of its local files."""
    diff_id = hashlib.sha256()
    with gzip.open(layer) as file:
        while data := file.read(MIB):
            diff_id.update(data)
    architecture = host_platform().architecture
    layout = Layout(directory / "source")
    layers = {"type": "layers", "diff_ids": [f"sha256:{diff_id.hexdigest()}"]}
    config = {"architecture": architecture, "os": "linux", "rootfs": layers}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": layout.add_json(config, CONFIG),
        "layers": [layout.add_blob(layer.read_bytes(), LAYER)],
    }
    platform = {"os": "linux", "architecture": architecture}
    layout.write_index([layout.add_json(manifest, MANIFEST, platform=platform)])
    turbo = f"oci:{directory / 'turbo'}:v1"
    with closing(RegistryClient()) as client:
        with (
            closing(open_source(f"oci:{directory / 'source'}", client)) as source,
            closing(open_destination(turbo, client)) as destination,
        ):
            convert_image(source, destination, options=ConvertOptions(turbo=("ext4",), work_dir=directory))
        with closing(open_source(turbo, client)) as source:
            return config_of_files(source, host_platform(), directory / "files", Silent())


@contextmanager
def mounted(service: DeviceService, config: Path, target: Path) -> Iterator[AttachedDevice]:
    device = service.attach(config, "bench")
    try:
        service.mount(device, target)
        try:
            yield device
        finally:
            mount.unmount(target)
    finally:
        service.detach("bench", force=True)


def in_order(path: Path) -> float:
    """Return the seconds of reading the file."""
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        buffer = bytearray(MIB)
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def at_random(path: Path, size: int, span: int, seed: int) -> float:
    """Return the seconds of a direct read, on average over places that are in different spans."""
    choose = random.Random(seed)
    # Every third: a span may be longer than the writer's distance, and a read must not find its neighbour decoded.
    starts = choose.sample(range(0, size - 4 * span, 3 * span), min(READS, size // (4 * span)))
    places = [(start + choose.randrange(span)) // 4096 * 4096 for start in starts]
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as buffer:
            began = time.perf_counter()
            for at in places:
                os.preadv(fd, [buffer], at)
            return (time.perf_counter() - began) / len(places)
    finally:
        os.close(fd)


def gzip_s(layer: Path) -> float:
    """Return the seconds of ``gzip -dc`` on one processor."""
    began = time.perf_counter()
    command = ["taskset", "--cpu-list", "0", "gzip", "-dc"]
    with layer.open("rb") as file:
        subprocess.run(command, stdin=file, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def processor_s(pid: int) -> float:
    """Return the processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def span_s(layer: Path, index: Path) -> tuple[float, float]:
    """Return the median seconds in which zlib inflates a span of the index, elapsed and of processor time."""
    times, busy = [], []
    with LocalFile(layer) as stored, LocalFile(index) as file:
        header, table = load_index(file)
        for number in random.Random(1).sample(range(len(table) - 1), min(READS, len(table) - 1)):
            row, begin, end = table[number], int(table[number]["stored"]), int(table[number + 1]["stored"])
            window = parse_window(file.read_at(int(row["window"]), int(row["length"])), header)
            bits = int(row["bits"])
            data = begin_inside_byte(stored.read_at(begin - 1, 1)[0], bits) if bits else b""
            data += stored.read_at(begin, end - begin)
            began, before = time.perf_counter(), time.process_time()
            zlib.decompressobj(wbits=-15, zdict=window).decompress(data)
            times.append(time.perf_counter() - began)
            busy.append(time.process_time() - before)
    return statistics.median(times), statistics.median(busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="content of the layer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gzip", type=Path, help="a gzip layer to measure instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="obdlab-benchmark-") as name:
        directory = Path(name)
        layer = args.gzip or directory / "layer.tar.gz"
        if args.gzip is None:
            make_layer(layer, args.mib)
        config = make_image(layer, directory)
        config.save(directory / "config.v1.json")
        index = Path(config.lowers[0].gzip_index)
        with LocalFile(index) as file:
            header, _ = load_index(file)
        service = DeviceService(directory / "run", Settings(cache_dir=directory / "cache"))
        target = directory / "mnt"
        target.mkdir()
        rounds: list[dict[str, float]] = []
        try:
            for number in range(args.rounds):
                span, span_busy = span_s(layer, index)
                row = {"gzip": gzip_s(layer), "span": span, "span processor": span_busy}
                for what in ("device", "one processor", "random"):
                    with mounted(service, directory / "config.v1.json", target) as device:
                        files = [path for path in target.rglob("*") if path.is_file() and not path.is_symlink()]
                        path = max(files, key=lambda each: each.stat().st_size)
                        size = path.stat().st_size
                        if what == "one processor":
                            command = ["taskset", "--all-tasks", "--cpu-list", "--pid", "1", str(device.pid)]
                            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
                        before = processor_s(device.pid)
                        row[what] = at_random(path, size, MIB, number) if what == "random" else in_order(path)
                        row[f"{what} processor"] = processor_s(device.pid) - before
                        if what == "random":
                            row["random processor"] /= min(READS, size // (4 * MIB))
                row["share"] = size / header.uncompressed_size
                rounds.append(row)
        finally:
            clean_up(service, force=True)
        report(rounds, layer.stat().st_size, header.uncompressed_size, header.entries)


def report(rounds: list[dict[str, float]], stored: int, size: int, entries: int) -> None:
    def middle(name: str) -> float:
        return statistics.median(row[name] for row in rounds)

    rates = {
        name: statistics.median(row["gzip"] * row["share"] / row[name] for row in rounds)
        for name in ("device", "one processor")
    }
    random_ratio = statistics.median(row["random"] / row["span"] for row in rounds)
    of_gzip = statistics.median(row["random"] / (row["gzip"] / entries) for row in rounds)
    busy = statistics.median(row["random processor"] / row["span processor"] for row in rounds)
    print(f"{size >> 20} MiB of content in {stored >> 20} MiB, {entries} entries, median of {len(rounds)} rounds")
    print(f"{'gzip -dc':24} {size / middle('gzip') / 1e6:7.0f} MB/s")
    for name, ratio in rates.items():
        rate = size * rounds[0]["share"] / middle(name) / 1e6
        print(f"in order, {name:14} {rate:7.0f} MB/s  {ratio:5.2f} of gzip -dc's rate")
    print(f"{'one span by zlib':24} {middle('span') * 1e3:7.2f} ms")
    both = f"{random_ratio:5.2f} of one span by zlib, {of_gzip:5.2f} by gzip -dc"
    print(f"{'at random, 4 KiB':24} {middle('random') * 1e3:7.2f} ms    {both}")
    print(f"{'  processor time':24} {middle('random processor') * 1e3:7.2f} ms    {busy:5.2f} of one span by zlib")


if __name__ == "__main__":
    main()
