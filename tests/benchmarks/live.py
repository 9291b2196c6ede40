"""A writable device in use: what a collection leaves on disk, and how long a live snapshot holds writes up.

Run as root: python -m tests.benchmarks.live [MiB that are overwritten ten times] [directory]
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from obdlab.image.config import ImageConfig, UpperConfig
from obdlab.image.settings import Settings
from obdlab.image.snapshot import make_next
from obdlab.layers.append import AppendUpper
from obdlab.service.cleanup import clean_up
from obdlab.service.client import DeviceService
from obdlab.service.live import LiveDevice
from tests.devices.contract import MIB, read_direct, write_direct
from tests.service.test_live import Load, allocated

ROUNDS = 10
SNAPSHOTS = 5


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1024) * MIB
    folder = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else "/var/tmp"))
    service = DeviceService(folder / "run", Settings(cache_dir=folder / "cache"))
    try:
        run(service, folder, size)
    finally:
        clean_up(service, force=True)
        shutil.rmtree(folder)


def run(service: DeviceService, folder: Path, size: int) -> None:
    data, index, config = folder / "data", folder / "index", folder / "config.v1.json"
    AppendUpper.create(data, index, size).close()
    ImageConfig(upper=UpperConfig(data=str(data), index=str(index))).save(config)
    device = service.attach(config, "bench")
    live = LiveDevice(service, "bench")
    for number in range(ROUNDS):
        piece = random.Random(number).randbytes(MIB)
        for at in range(0, size, MIB):
            write_direct(device.path, at, piece)
    before, full = read_direct(device.path, 0, 16 * MIB), allocated(data)
    load = Load(device, 16 * MIB // 4096)
    with load.going_on():
        began = time.monotonic()
        live.collect()
        taken = time.monotonic() - began
        left = (allocated(data) + allocated(index)) / size
    assert read_direct(device.path, 0, 16 * MIB) == load.content(before)
    print(f"gc in use: {full / size:.2f} of the data before, {left:.3f} after, in {taken:.1f} s; "
          f"the slowest write meanwhile {load.slowest_s * 1000:.0f} ms")  # fmt: skip
    load = Load(device, 16 * MIB // 4096)
    paused = []
    with load.going_on():
        for number in range(SNAPSHOTS):
            following = folder / f"next{number}.json"
            make_next(config, folder / f"data{number}", folder / f"index{number}").save(following)
            paused.append(live.snapshot(following).paused_s * 1000)
            time.sleep(0.5)
    print(f"live snapshots: writes held for {', '.join(f'{ms:.0f}' for ms in paused)} ms; "
          f"the slowest write meanwhile {load.slowest_s * 1000:.0f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
