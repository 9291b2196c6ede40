"""How fast a device is: throughput against a plain loop device, attach to mounted, memory of an idle server.

Run as root: ``python tests/benchmarks/device.py [--seconds 3]``. Quote the ratios: absolute figures depend on the
machine.
The blob is the plainest there is (a file read by pread), so that what is measured is the device and not the image.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from obdlab.blob import Blob, check_range
from obdlab.call import Call
from obdlab.devices import loop
from obdlab.devices.fuse_loop import FuseLoopDevice
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.system import mount

MIB = 1 << 20
GOLDEN = Path(__file__).parents[1] / "golden" / "ext4"
JOBS = {
    "4 KiB random, QD16": ("IOPS", ["--rw=randread", "--bs=4k", "--iodepth=16"]),
    "4 KiB random, QD1": ("IOPS", ["--rw=randread", "--bs=4k", "--iodepth=1"]),
    "128 KiB sequential, QD4": ("MiB/s", ["--rw=read", "--bs=128k", "--iodepth=4"]),
    "1 MiB sequential, QD4": ("MiB/s", ["--rw=read", "--bs=1m", "--iodepth=4"]),
}


class FileBlob(Blob):
    """A file, read by pread."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._fd = os.open(path, os.O_RDONLY)
        self._size = path.stat().st_size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        check_range(self, offset, length)
        return os.pread(self._fd, length, offset)

    def close(self) -> None:
        os.close(self._fd)


def fio(device: Path, unit: str, options: list[str], seconds: float) -> float:
    command = ["fio", "--name=job", f"--filename={device}", "--readonly", "--direct=1", "--ioengine=libaio"]
    command += ["--time_based", f"--runtime={seconds}", "--output-format=json", *options]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    read = json.loads(out[out.index("{") :])["jobs"][0]["read"]
    return float(read["iops"] if unit == "IOPS" else read["bw_bytes"] / MIB)


def throughput(seconds: float, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        with path.open("wb") as file:
            for _ in range(256):
                file.write(os.urandom(MIB))
        blob, label = FileBlob(path), f"obdlab-benchmark-{os.getpid()}"
        with path.open("rb") as file:
            plain = loop.attach(
                file.fileno(), label=f"obdlab-benchmark-{os.getpid()}", read_only=True, direct_io=False
            )
        device = FuseLoopDevice(blob, Path(directory) / "device")
        try:
            print(f"{'':26}{'plain loop':>14}{'ours':>14}  ratio (median of {rounds}, interleaved)")
            for name, (unit, options) in JOBS.items():
                pairs = [
                    (fio(plain, unit, options, seconds), fio(device.path, unit, options, seconds))
                    for _ in range(rounds)
                ]
                ratio = statistics.median(ours / theirs for theirs, ours in pairs)
                theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
                print(f"{name:26}{theirs:>10.0f} {unit:4}{ours:>9.0f} {unit:5}{ratio:7.2f}")
        finally:
            device.stop()
            loop.detach(plain, label=label)
            blob.close()


def attach(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name).resolve()
        service = DeviceService(directory / "run", Settings(cache_dir=directory / "cache"))
        target = directory / "mnt"
        target.mkdir()
        config = directory / "config.v1.json"
        ImageConfig(lowers=tuple(LowerConfig(file=str(GOLDEN / f"layer{n}.obd")) for n in (1, 2))).save(config)
        try:
            times = []
            for _ in range(rounds + 1):
                started = time.monotonic()
                device = service.attach(config, "bench")
                service.mount(device, target)
                times.append((time.monotonic() - started) * 1000)
                memory = pss(device.pid)
                mount.unmount(target)
                started = time.monotonic()
                service.detach("bench")
                detach_ms = (time.monotonic() - started) * 1000
            middle, worst = statistics.median(times[1:]), max(times[1:])
            print(f"attach to mounted, local layers: {middle:.0f} ms, worst {worst:.0f} ms")
            print(f"  the first one, with the start of the host: {times[0]:.0f} ms; detach {detach_ms:.0f} ms")
            print(
                "memory of an idle server (MiB): " + ", ".join(f"{key} {value:.1f}" for key, value in memory.items())
            )
        finally:
            clean_up(service, force=True)


def pss(pid: int) -> dict[str, float]:
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {line[0].rstrip(":"): int(line[1]) for line in lines}
    return {key: kib[key] / 1024 for key in ("Rss", "Pss", "Pss_Anon", "Pss_File", "Private_Dirty")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    attach(args.rounds * 3)
    throughput(args.seconds, args.rounds)


if __name__ == "__main__":
    main()
