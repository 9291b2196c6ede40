"""An image as a device against its decoded disk on a plain loop device: fio, and tar and du of a tree of small files.

Run as root: python -m tests.benchmarks.device_images [--files 40000] [--rounds 3] [--settings]. Layers are local,
ZFile with LZ4 and blocks of 4 KiB; both are read through the page cache of their files, which is warm, and mounted
anew for each walk of the tree, so that nothing above the devices is cached. ``--settings`` compares read-ahead and
schedulers.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import loop
from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.writing import Packing
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount
from tests.benchmarks.device import JOBS, fio

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
LABEL = f"obdlab-benchmark-{os.getpid()}"
WALKS = {"tar": "tar cf - -C {} . | cat > /dev/null", "du": "du -sx {} > /dev/null"}


def make_tree(folder: Path, files: int) -> None:
    """An ext4 of so many files as system packages have them: most small, all compressible by half."""
    rng, tree = random.Random(1), folder / "tree"
    text = rng.randbytes(1 << 16)
    for number in range(files):
        directory = tree / f"{number // 2000}" / f"{number // 50}"
        if not number % 50:
            directory.mkdir(parents=True)
        size = int(rng.lognormvariate(7.5, 1.6)) % (1 << 20)
        start = rng.randrange(1 << 15)
        (directory / f"file{number}").write_bytes((text[start : start + 2048] + bytes(2048)) * (size // 4096 + 1))
    with (folder / "tree.raw").open("wb") as disk:
        disk.truncate(2 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(tree), str(folder / "tree.raw")], check=True)
    shutil.rmtree(tree)
    with (folder / "data.raw").open("wb") as disk:
        for _ in range(256):
            disk.write((rng.randbytes(2048) + bytes(2048)) * 256)
    for name in ("tree", "data"):
        import_disk(folder / f"{name}.raw", folder / f"{name}.obd", Packing(), kind="raw")
        ImageConfig(lowers=(LowerConfig(file=str(folder / f"{name}.obd")),)).save(folder / f"{name}.json")


@contextmanager
def plain(path: Path, readahead_kib: int = 128) -> Iterator[Path]:
    with path.open("rb") as file:
        device = loop.attach(file.fileno(), label=LABEL, read_only=True, direct_io=False, readahead_kib=readahead_kib)
    try:
        yield device
    finally:
        patiently(lambda: loop.detach(device, label=LABEL))


@contextmanager
def ours(service: DeviceService, config: Path) -> Iterator[Path]:
    device = service.attach(config, config.stem)
    try:
        yield device.path
    finally:
        patiently(lambda: service.detach(config.stem))


# Other work on the machine may have copied the mounts for a while.
def patiently(do: object) -> None:
    for _ in range(60):
        try:
            do()  # type: ignore[operator]
            return
        except DeviceError:
            time.sleep(1)
    raise AssertionError("stays in use")


def walk(device: Path, target: Path, command: str) -> float:
    mount.mount(device, target, read_only=True)
    try:
        began = time.monotonic()
        subprocess.run(command.format(target), shell=True, check=True)
        return time.monotonic() - began
    finally:
        mount.unmount(target)


def compare(service: DeviceService, folder: Path, rounds: int, seconds: float) -> None:
    print(f"{'':26}{'plain loop':>14}{'ours':>14}  ratio (median of {rounds}, interleaved)")
    with plain(folder / "data.raw") as theirs, ours(service, folder / "data.json") as mine:
        for name, (unit, options) in JOBS.items():
            pairs = [(fio(theirs, unit, options, seconds), fio(mine, unit, options, seconds)) for _ in range(rounds)]
            show(name, unit, pairs)
    target = folder / "mnt"
    target.mkdir()
    for name, command in WALKS.items():
        pairs = []
        for _ in range(rounds):
            with plain(folder / "tree.raw") as theirs:
                first = walk(theirs, target, command)
            with ours(service, folder / "tree.json") as mine:
                pairs.append((first, walk(mine, target, command)))
        show(name, "s", pairs)


def show(name: str, unit: str, pairs: list[tuple[float, float]]) -> None:
    theirs, mine = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(second / first for first, second in pairs)
    digits = 2 if unit == "s" else 0
    print(f"{name:26}{theirs:>10.{digits}f} {unit:4}{mine:>9.{digits}f} {unit:5}{ratio:7.2f}", flush=True)


def compare_settings(folder: Path, rounds: int, seconds: float) -> None:
    """Read-ahead is the file system's and bears on tar; the scheduler bears on all."""
    target = folder / "mnt"
    target.mkdir(exist_ok=True)
    rows: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for readahead_kib in (0, 128, 512, 1024, 4096):
            for scheduler in ("none", "mq-deadline"):
                settings = Settings(cache_dir=folder / "cache", device_readahead_kib=readahead_kib)
                service = DeviceService(folder / "run", settings)
                with ours(service, folder / "tree.json") as device:
                    (Path("/sys/block") / device.name / "queue" / "scheduler").write_text(scheduler)
                    taken = walk(device, target, WALKS["tar"])
                    iops = fio(device, "IOPS", JOBS["4 KiB random, QD16"][1], seconds)
                    rows.setdefault((readahead_kib, scheduler), []).append((taken, iops))
    for (readahead_kib, scheduler), values in rows.items():
        taken, iops = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"read-ahead {readahead_kib:5} KiB, {scheduler:12} tar {taken:6.2f} s, 4 KiB QD16 {iops:8.0f} IOPS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="per run of fio")
    parser.add_argument("--settings", action="store_true")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir="/var/tmp")).resolve()
    service = DeviceService(folder / "run", Settings(cache_dir=folder / "cache"))
    try:
        make_tree(folder, args.files)
        if args.settings:
            compare_settings(folder, args.rounds, args.seconds)
        else:
            compare(service, folder, args.rounds, args.seconds)
    finally:
        clean_up(service, force=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
