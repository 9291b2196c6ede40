"""A device that graduates under load: how long its readers wait, and what it reads before and after.

Run as root: python -m tests.benchmarks.graduation [--mib 512] [--rounds 3]. fio checks what it reads. After the
change the kernel reads around the page cache (direct I/O), before it the server reads the layer file through it:
where the disk is slow, "after" tells how fast that is. ``--memory`` puts all files in /dev/shm, to leave it out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.devices import loop
from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.writing import Packing
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.unpacking import graduate
from obdlab.settings.settings import Settings
from obdlab.system import mount

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
FIO = ["fio", "--name=job", "--ioengine=libaio", "--iodepth=16", "--bs=4k", "--verify=crc32c", "--verify_fatal=1"]


def make_images(folder: Path, mib: int) -> None:
    tree = folder / "tree"
    tree.mkdir()
    command = [*FIO, f"--filename={tree / 'file'}", f"--size={mib}m", "--rw=write", "--do_verify=0"]
    subprocess.run([*command, "--buffer_compress_percentage=60"], check=True, capture_output=True, cwd=folder)
    with (folder / "ext4.raw").open("wb") as disk:
        disk.truncate((mib + 64) * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(tree), str(folder / "ext4.raw")], check=True)
    subprocess.run(["mkfs.erofs", "-b4096", str(folder / "erofs.raw"), str(tree)], check=True, capture_output=True)
    (tree / "file").rename(folder / "bare.raw")
    for name in ("bare", "ext4", "erofs"):
        import_disk(folder / f"{name}.raw", folder / f"{name}.obd", Packing(), kind="raw")
        lower = LowerConfig(file=str(folder / f"{name}.obd"))
        ImageConfig(lowers=(lower,)).save(folder / f"{name}.json")


def fio_command(target: Path, mib: int, seconds: float) -> list[str]:
    options = ["--readonly", "--direct=1", "--rw=randread", f"--size={mib}m", "--verify_state_save=0"]
    options += ["--time_based", f"--runtime={seconds}", "--output-format=json"]
    return [*FIO, f"--filename={target}", *options]


def result(out: str) -> tuple[float, float]:
    """IOPS, and the longest that a read took, in ms."""
    (job,) = json.loads(out[out.index("{") :])["jobs"]
    assert job["error"] == 0
    return job["read"]["iops"], job["read"]["clat_ns"]["max"] / 1e6


@contextmanager
def mounted(service: DeviceService, name: str, folder: Path) -> Iterator[Path]:
    device = service.attach(folder / f"{name}.json", name)
    if name == "bare":
        yield device.path
        return
    target = folder / f"mnt-{name}"
    target.mkdir(exist_ok=True)
    service.mount(device, target)
    try:
        yield target / "file"
    finally:
        mount.unmount(target)


# Other work on the machine may have copied the mounts for a while.
def detach(service: DeviceService, name: str) -> None:
    for _ in range(60):
        try:
            service.detach(name)
            return
        except DeviceError:
            time.sleep(1)
    raise AssertionError(f"{name} stays in use")


def one(service: DeviceService, name: str, folder: Path, mib: int, seconds: float) -> list[float]:
    with mounted(service, name, folder) as target:
        idle = subprocess.run(fio_command(target, mib, seconds), check=True, capture_output=True, text=True).stdout
    if name == "ext4":  # made anew, to graduate by itself
        detach(service, name)
        service = DeviceService(service.run_dir.path, replace(service._settings, graduation=True))
    with mounted(service, name, folder) as target:
        began, paused_s = time.monotonic(), float("nan")
        with subprocess.Popen(fio_command(target, mib, 600), stdout=subprocess.PIPE, text=True) as fio:
            time.sleep(0.5)
            if name != "ext4":
                paused_s = graduate(service.run_dir, name).paused_s
            while not service.list()[0].graduated:
                time.sleep(0.02)
            taken = time.monotonic() - began
            time.sleep(0.5)
            fio.send_signal(2)
            during = fio.communicate()[0]
        after = subprocess.run(fio_command(target, mib, seconds), check=True, capture_output=True, text=True).stdout
    detach(service, name)
    before, longest = result(idle)
    return [before, longest, *result(during), paused_s * 1000, taken, result(after)[0]]


def plain(folder: Path, mib: int, seconds: float) -> float:
    label = "obdlab-benchmark-graduation"
    with (folder / "bare.raw").open("rb") as file:
        device = loop.attach(file.fileno(), label=label, read_only=True)
    try:
        out = subprocess.run(fio_command(device, mib, seconds), check=True, capture_output=True, text=True).stdout
        return result(out)[0]
    finally:
        loop.detach(device, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--memory", action="store_true", help="files in memory")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if args.memory else "/var/tmp")).resolve()
    service = DeviceService(folder / "run", Settings(cache_dir=folder / "cache", cache_min_free=0))
    try:
        make_images(folder, args.mib)
        print("4 KiB random reads, QD16, checked:  IOPS before (longest)   while unpacking and changing (longest;")
        print("of it the change)   taken   IOPS after   of a plain loop device")
        for name in ("bare", "ext4", "erofs"):
            rows = []
            for _ in range(args.rounds):
                shutil.rmtree(folder / "cache", ignore_errors=True)
                rows.append(
                    [*one(service, name, folder, args.mib, args.seconds), plain(folder, args.mib, args.seconds)]
                )
            before, longest, during, stall, paused, taken, after, reference = map(
                statistics.median, zip(*rows, strict=True)
            )
            worst = max(row[3] for row in rows)
            print(
                f"{name:6} {before:8.0f} ({longest:.0f} ms)  {during:8.0f} ({stall:.0f} ms, worst {worst:.0f}; "
                f"{paused:.0f} ms)  {taken:.1f} s  {after:8.0f}  {after / reference:.2f}"
            )
    finally:
        clean_up(service, force=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
