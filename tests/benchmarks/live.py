"""A writable device in use: what a collection leaves on disk, and how long a live snapshot holds writes up.

Run as root: python -m tests.benchmarks.live [MiB that are overwritten ten times] [directory] [segments of a layer]
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from obdlab.image.config import ImageConfig, UpperConfig
from obdlab.layerfiles.snapshot import make_next
from obdlab.layers.append import AppendUpper
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.live import LiveDevice
from obdlab.settings.settings import Settings
from tests.devices.contract import MIB, read_direct, write_direct
from tests.server.test_live import Load, allocated

ROUNDS = 10
SNAPSHOTS = 5


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1024) * MIB
    folder = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else "/var/tmp"))
    service = DeviceService(folder / "run", Settings(cache_dir=folder / "cache"))
    try:
        snapshot_of_many(service, folder, int(sys.argv[3]) if len(sys.argv) > 3 else 300_000)
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


def snapshot_of_many(service: DeviceService, folder: Path, segments: int) -> None:
    """How long the slowest write takes while a layer of many segments is sealed."""
    size, rng, piece = 8 << 30, random.Random(1), bytes(range(256)) * 2
    data, index, config = folder / "many", folder / "many.index", folder / "many.json"
    with AppendUpper.create(data, index, size) as upper:
        upper.set_group_commit(1000)
        for _ in range(segments):
            upper.write_at(rng.randrange(size // 4096) * 4096, piece)
        upper.set_group_commit(0)
    ImageConfig(upper=UpperConfig(data=str(data), index=str(index))).save(config)
    device = service.attach(config, "many")
    live, slowest, paused, quiet = LiveDevice(service, "many"), [], [], []
    for number in range(SNAPSHOTS):
        load = Load(device, 16 * MIB // 4096)
        with load.going_on():
            time.sleep(1)
            quiet.append(load.slowest_s * 1000)
            following = folder / f"many{number}.json"
            make_next(config, folder / f"many{number}", folder / f"many{number}.index").save(following)
            paused.append(live.snapshot(following).paused_s * 1000)
            time.sleep(0.5)
        slowest.append(load.slowest_s * 1000)
        if not number:
            print(f"the first snapshot, of {segments} segments: writes held for {paused[0]:.0f} ms; the slowest "
                  f"{slowest[0]:.0f} ms, {quiet[0]:.0f} ms without a snapshot")  # fmt: skip
    print(f"with them in the lower layer: held for {', '.join(f'{ms:.0f}' for ms in paused[1:])} ms; the slowest "
          f"{', '.join(f'{ms:.0f}' for ms in slowest[1:])} ms")  # fmt: skip
    service.detach("many")


if __name__ == "__main__":
    main()
